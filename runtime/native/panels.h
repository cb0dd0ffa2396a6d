// How a packed weight lies in memory for the kernels. Files and training keep the neutral layout of formats.py; this one
// is made from it once, when a weight is first used on a CPU (panels.cpp), and is the same for every instruction set.
// Its codes are a piece of memory of their own: weights that differ in scales and outliers alone, as those of several
// tasks do, share it.
//
// A weight [rows, columns] is a sum of `terms`, each with codes u of `bits` bits:
//
//     W[r][k] = sum over terms of (multiple * u - subtrahend - zero[r][g]) * scale[r][g],    g = the group of column k
//
// Affine and ternary weights have one term with multiple 1 and the implied zero point as the subtrahend; asymmetric ones
// add what their zero point has on top of it. Binary is 2 u - 1. Binary coding (BCQ) has a binary term for each plane.
//
// Rows come in panels of 16, columns in blocks of 32; both are padded (codes and scales 0). A block of a panel:
//
//     plane | plane | ...      a code's bits, the lowest first, in planes of 8, 4, 2 or 1 bits: 3 bits are 2 and 1
//     plane = w vectors of 64 bytes, w the plane's width
//     byte 4 r + j of vector v holds, at bit w p, row r's columns 4 q + j, with q = v * (8 / w) + p
//
// so that the 32-bit lane of a vector is the row: a product of four columns with four activations ends in the lane of
// its row, and nothing is ever summed across lanes. One quad q of 16 rows, as bytes, is also a row of an AMX tile.
//
// Sections begin at multiples of 64 bytes. The codes' memory:
//     codes   [panels][terms][blocks][bits * 64] bytes
//     sums    [panels][terms][groups][16] int32: sum of each group's codes
// and that of the scales:
//     scales  [panels][terms][groups][16] float
//     zeros   the same shape, if the weight is asymmetric
//     sums    [panels * 16] float: sum of each row's weights (outliers included), for activations with a zero point
//     outlier offsets [rows + 1] int32, columns [count] int32, values [count] float: they are added to the weight

#ifndef PREQUANT_PANELS_H
#define PREQUANT_PANELS_H

#include <stdint.h>

namespace prequant {

constexpr int kPanelRows = 16;
constexpr int kBlockColumns = 32;
constexpr int kQuads = kBlockColumns / 4;  // of a block
constexpr int kVector = 64;                // bytes: four columns of each of the panel's rows
constexpr int64_t kMaxColumns = 1 << 16;   // so that no sum of 8-bit products leaves 32 bits
constexpr uint32_t kPanelsVersion = 2;
constexpr char kCodesMagic[8] = {'P', 'Q', 'C', 'O', 'D', 'E', 'S', ' '};
constexpr char kScalesMagic[8] = {'P', 'Q', 'S', 'C', 'A', 'L', 'E', 'S'};

// What the codes of a weight have in common with the scales that go with them.
struct WeightShape {
    int32_t bits;
    int32_t terms;
    int32_t multiple;
    int32_t subtrahend;
    int64_t group_blocks;  // blocks that share a scale; `blocks` for one scale a row
    int64_t rows, columns;
    int64_t panels, blocks, groups;
};

struct CodesHeader {
    char magic[8];
    int64_t version;
    WeightShape shape;
    int64_t codes, sums;  // from the start
    int64_t bytes;
};

struct PanelsHeader : WeightShape {
    char magic[8];
    int64_t version;
    int64_t outliers;
    int64_t scales, zeros, sums, outlier_offsets, outlier_columns, outlier_values;  // from the start; 0: none
    int64_t bytes;
};

// What the kernels read.
struct Panels {
    const PanelsHeader *header;
    const uint8_t *codes;
    const float *scales, *zeros, *sums;
    const int32_t *outlier_offsets, *outlier_columns;
    const float *outlier_values;
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// An even number of blocks, as AMX takes two at a time.
inline int64_t blocks_of(int64_t columns) { return round_up(columns, 2 * kBlockColumns) / kBlockColumns; }

inline Panels panels_of(const void *codes, const void *scales) {
    const auto *base = static_cast<const uint8_t *>(scales);
    const auto *header = reinterpret_cast<const PanelsHeader *>(base);
    const auto floats = [base](int64_t offset) {
        return offset ? reinterpret_cast<const float *>(base + offset) : nullptr;
    };
    const auto integers = [base](int64_t offset) {
        return offset ? reinterpret_cast<const int32_t *>(base + offset) : nullptr;
    };
    return {header,
            static_cast<const uint8_t *>(codes) + static_cast<const CodesHeader *>(codes)->codes,
            floats(header->scales),
            floats(header->zeros),
            floats(header->sums),
            integers(header->outlier_offsets),
            integers(header->outlier_columns),
            floats(header->outlier_values)};
}

// Whether these are memory that prequant_pack_codes and prequant_pack_scales wrote, of one shape.
bool valid_panels(const void *codes, const void *scales);

// The widths of the planes that `bits` splits into, the plane of the lowest bits first; 0 ends the list.
struct Planes {
    int width[4];
};

constexpr Planes planes_of(int bits) {
    Planes planes{};
    int n = 0, left = bits;
    for (int width = 8; width >= 1; width /= 2) {
        if (left >= width && (width != 8 || left == 8)) {
            planes.width[n++] = width;
            left -= width;
        }
    }
    return planes;
}

// How many they are.
constexpr int count_of(int bits) {
    int n = 0;
    while (planes_of(bits).width[n]) ++n;
    return n;
}

}  // namespace prequant

#endif
