// From the neutral layout of formats.py to panels (panels.h), and back to a check that memory holds panels at all.

#include "panels.h"

#include <cstring>

#include "prequant_native.h"
#include "threads.h"

namespace {

using namespace prequant;

// Codes of row `row` of term `term`, columns [first, first + 32); what lies beyond the weight is 0.
struct NeutralCodes {
    const prequant_weight &weight;

    int64_t row_bytes() const {
        return weight.base3 ? (weight.columns + 4) / 5 : (weight.columns * weight.bits + 7) / 8;
    }

    void block(int64_t term, int64_t row, int64_t first, uint8_t *codes) const {
        std::memset(codes, 0, kBlockColumns);
        if (row >= weight.rows || first >= weight.columns) return;
        const uint8_t *bytes = weight.codes + (term * weight.rows + row) * row_bytes();
        const int64_t left = weight.columns - first;
        const int count = left < kBlockColumns ? static_cast<int>(left) : kBlockColumns;
        for (int i = 0; i < count; ++i) codes[i] = weight.base3 ? trit(bytes, first + i) : bits(bytes, first + i);
    }

    static uint8_t trit(const uint8_t *bytes, int64_t column) {
        constexpr uint8_t powers[5] = {1, 3, 9, 27, 81};
        return static_cast<uint8_t>(bytes[column / 5] / powers[column % 5] % 3);
    }

    uint8_t bits(const uint8_t *bytes, int64_t column) const {
        const int64_t bit = column * weight.bits;
        uint32_t word = bytes[bit / 8];
        if (bit % 8 + weight.bits > 8) word |= static_cast<uint32_t>(bytes[bit / 8 + 1]) << 8;
        return static_cast<uint8_t>(word >> (bit % 8) & ((1u << weight.bits) - 1));
    }
};

// The codes [16][32] of a block into its planes.
void write_block(const uint8_t (*codes)[kBlockColumns], int bits, uint8_t *out) {
    const Planes planes = planes_of(bits);
    int low = 0;
    for (int n = 0; n < 4 && planes.width[n]; ++n) {
        const int width = planes.width[n], per_byte = 8 / width;
        const unsigned mask = (1u << width) - 1;
        for (int v = 0; v < width; ++v) {
            for (int r = 0; r < kPanelRows; ++r) {
                for (int j = 0; j < 4; ++j) {
                    unsigned byte = 0;
                    for (int p = 0; p < per_byte; ++p) {
                        byte |= (codes[r][4 * (v * per_byte + p) + j] >> low & mask) << (p * width);
                    }
                    *out++ = static_cast<uint8_t>(byte);
                }
            }
        }
        low += width;
    }
}

bool makes_sense(const prequant_weight &w) {
    return w.rows >= 0 && w.columns >= 1 && w.columns <= kMaxColumns && w.bits >= 1 && w.bits <= 8 && w.terms >= 1 &&
           w.terms <= 8 && w.group_size >= 0 && w.group_size % kBlockColumns == 0 && w.outliers >= 0 &&
           (w.multiple == 1 || w.multiple == 2) && (!w.base3 || w.bits == 2);
}

WeightShape shape_of(const prequant_weight &w) {
    WeightShape shape{};
    shape.bits = w.bits;
    shape.terms = w.terms;
    shape.multiple = w.multiple;
    shape.subtrahend = w.subtrahend;
    shape.rows = w.rows;
    shape.columns = w.columns;
    shape.panels = round_up(w.rows, kPanelRows) / kPanelRows;
    shape.blocks = blocks_of(w.columns);
    shape.group_blocks = w.group_size ? w.group_size / kBlockColumns : shape.blocks;
    shape.groups = w.group_size ? (w.columns + w.group_size - 1) / w.group_size : 1;
    return shape;
}

// Numbers of 32 bits, one for each row, group and term.
int64_t group_bytes(const WeightShape &shape) { return shape.panels * shape.terms * shape.groups * kPanelRows * 4; }

// Gives out sections behind a header.
struct Ends {
    int64_t end;

    int64_t section(int64_t bytes) {
        const int64_t start = end;
        end = round_up(end + bytes, 64);
        return start;
    }
};

CodesHeader codes_header_of(const prequant_weight &w) {
    CodesHeader h{};
    std::memcpy(h.magic, kCodesMagic, sizeof h.magic);
    h.version = kPanelsVersion;
    h.shape = shape_of(w);
    Ends ends{round_up(sizeof(CodesHeader), 64)};
    h.codes = ends.section(h.shape.panels * h.shape.terms * h.shape.blocks * h.shape.bits * kVector);
    h.sums = ends.section(group_bytes(h.shape));
    h.bytes = ends.end;
    return h;
}

PanelsHeader scales_header_of(const prequant_weight &w) {
    PanelsHeader h{};
    static_cast<WeightShape &>(h) = shape_of(w);
    std::memcpy(h.magic, kScalesMagic, sizeof h.magic);
    h.version = kPanelsVersion;
    h.outliers = w.outliers;
    Ends ends{round_up(sizeof(PanelsHeader), 64)};
    h.scales = ends.section(group_bytes(h));
    h.zeros = w.zeros ? ends.section(group_bytes(h)) : 0;
    h.sums = ends.section(h.panels * kPanelRows * 4);
    if (w.outliers) {
        h.outlier_offsets = ends.section((w.rows + 1) * 4);
        h.outlier_columns = ends.section(w.outliers * 4);
        h.outlier_values = ends.section(w.outliers * 4);
    }
    h.bytes = ends.end;
    return h;
}

bool belong_together(const CodesHeader &codes, const PanelsHeader &scales) {
    return std::memcmp(codes.magic, kCodesMagic, sizeof codes.magic) == 0 && codes.version == kPanelsVersion &&
           std::memcmp(scales.magic, kScalesMagic, sizeof scales.magic) == 0 && scales.version == kPanelsVersion &&
           std::memcmp(&codes.shape, static_cast<const WeightShape *>(&scales), sizeof codes.shape) == 0;
}

bool outliers_make_sense(const prequant_weight &w) {
    for (int64_t i = 0; i < w.outliers; ++i) {
        if (w.outlier_columns[i] < 0 || w.outlier_columns[i] >= w.columns) return false;
    }
    for (int64_t row = 0; w.outliers && row < w.rows; ++row) {
        const int32_t *offsets = w.outlier_offsets;
        if (offsets[0] != 0 || offsets[row] > offsets[row + 1] || offsets[w.rows] != w.outliers) return false;
    }
    return true;
}

template <class T> T *at(void *memory, int64_t offset) {
    return reinterpret_cast<T *>(static_cast<uint8_t *>(memory) + offset);
}

// Where what belongs to a group of a panel's rows stands.
int64_t place_of(const WeightShape &shape, int64_t panel, int64_t term, int64_t group) {
    return ((panel * shape.terms + term) * shape.groups + group) * kPanelRows;
}

void pack_codes(const prequant_weight &w, const CodesHeader &header, void *out, int64_t panel) {
    const NeutralCodes neutral{w};
    const WeightShape &h = header.shape;
    for (int64_t term = 0; term < h.terms; ++term) {
        uint8_t *codes = at<uint8_t>(out, header.codes) + (panel * h.terms + term) * h.blocks * h.bits * kVector;
        int32_t *sums = at<int32_t>(out, header.sums) + place_of(h, panel, term, 0);
        std::memset(sums, 0, h.groups * kPanelRows * 4);
        for (int64_t block = 0; block < h.blocks; ++block, codes += h.bits * kVector) {
            uint8_t unpacked[kPanelRows][kBlockColumns];
            for (int r = 0; r < kPanelRows; ++r) {
                neutral.block(term, panel * kPanelRows + r, block * kBlockColumns, unpacked[r]);
                if (block * kBlockColumns >= h.columns) continue;
                for (const uint8_t code : unpacked[r]) sums[block / h.group_blocks * kPanelRows + r] += code;
            }
            write_block(unpacked, h.bits, codes);
        }
    }
}

struct ScalesPacker {
    const prequant_weight &w;
    const PanelsHeader &h;
    const int32_t *code_sums;
    void *out;

    int64_t scale_index(int64_t term, int64_t row, int64_t group) const {
        if (w.shared_scale) return 0;
        return (term * w.rows + row) * h.groups + group;
    }

    float zero(int64_t i) const { return w.zeros ? w.zeros[i] : static_cast<float>(w.subtrahend); }

    void panel(int64_t panel) const {
        double sums[kPanelRows] = {};
        for (int64_t term = 0; term < h.terms; ++term) {
            for (int64_t group = 0; group < h.groups; ++group) {
                const int64_t place = place_of(h, panel, term, group);
                for (int r = 0; r < kPanelRows; ++r) {
                    const int64_t row = panel * kPanelRows + r;
                    const bool inside = row < w.rows;
                    const int64_t i = inside ? scale_index(term, row, group) : 0;
                    at<float>(out, h.scales)[place + r] = inside ? w.scales[i] : 0.0f;
                    if (h.zeros) {
                        at<float>(out, h.zeros)[place + r] = inside ? zero(i) - static_cast<float>(w.subtrahend) : 0.0f;
                    }
                    if (inside) sums[r] += sum(group, code_sums[place + r], i);
                }
            }
        }
        for (int r = 0; r < kPanelRows; ++r) {
            const int64_t row = panel * kPanelRows + r;
            if (w.outliers && row < w.rows) sums[r] += outliers(row);
            at<float>(out, h.sums)[row] = static_cast<float>(sums[r]);
        }
    }

    // Of a group's weights in one row.
    double sum(int64_t group, int32_t codes, int64_t i) const {
        const int64_t size = h.group_blocks * kBlockColumns, left = w.columns - group * size;
        return (w.multiple * static_cast<double>(codes) - static_cast<double>(zero(i)) * (left < size ? left : size)) *
               static_cast<double>(w.scales[i]);
    }

    float value(int64_t term, int64_t row, int64_t column) const {
        uint8_t codes[kBlockColumns];
        const int64_t block = column / kBlockColumns, i = scale_index(term, row, block / h.group_blocks);
        NeutralCodes{w}.block(term, row, block * kBlockColumns, codes);
        return (static_cast<float>(w.multiple * static_cast<int>(codes[column % kBlockColumns])) - zero(i)) * w.scales[i];
    }

    // What a row's outliers add to the weight; returns their sum.
    double outliers(int64_t row) const {
        double sum = 0;
        for (int64_t i = w.outlier_offsets[row]; i < w.outlier_offsets[row + 1]; ++i) {
            const int64_t column = w.outlier_columns[i];
            float added = w.outlier_values[i];
            for (int64_t term = 0; w.outliers_replace && term < h.terms; ++term) added -= value(term, row, column);
            at<float>(out, h.outlier_values)[i] = added;
            at<int32_t>(out, h.outlier_columns)[i] = static_cast<int32_t>(column);
            sum += added;
        }
        return sum;
    }
};

}  // namespace

namespace prequant {

bool valid_panels(const void *codes, const void *scales) {
    return codes && scales && reinterpret_cast<uintptr_t>(codes) % 64 == 0 &&
           reinterpret_cast<uintptr_t>(scales) % 64 == 0 &&
           belong_together(*static_cast<const CodesHeader *>(codes), *static_cast<const PanelsHeader *>(scales));
}

}  // namespace prequant

extern "C" {

PREQUANT_API int64_t prequant_codes_bytes(const prequant_weight *weight) {
    return makes_sense(*weight) ? codes_header_of(*weight).bytes : -1;
}

PREQUANT_API int32_t prequant_pack_codes(const prequant_weight *weight, void *codes, int32_t threads) {
    if (threads < 1 || !makes_sense(*weight)) return PREQUANT_BAD_WEIGHT;
    const CodesHeader header = codes_header_of(*weight);
    std::memcpy(codes, &header, sizeof header);
    parallel(threads, [weight, codes, &header, threads](int32_t part) {
        const int64_t panels = header.shape.panels, last = panels * (part + 1) / threads;
        for (int64_t panel = panels * part / threads; panel < last; ++panel) pack_codes(*weight, header, codes, panel);
    });
    return PREQUANT_OK;
}

PREQUANT_API int64_t prequant_scales_bytes(const prequant_weight *weight) {
    return makes_sense(*weight) ? scales_header_of(*weight).bytes : -1;
}

PREQUANT_API int32_t prequant_pack_scales(const prequant_weight *weight, const void *codes, void *scales,
                                          int32_t threads) {
    if (threads < 1 || !makes_sense(*weight) || !outliers_make_sense(*weight)) return PREQUANT_BAD_WEIGHT;
    const PanelsHeader header = scales_header_of(*weight);
    if (!belong_together(*static_cast<const CodesHeader *>(codes), header)) return PREQUANT_BAD_PANELS;
    std::memcpy(scales, &header, sizeof header);
    const auto *base = static_cast<const uint8_t *>(codes);
    const int64_t sums = static_cast<const CodesHeader *>(codes)->sums;
    const ScalesPacker packer{*weight, header, reinterpret_cast<const int32_t *>(base + sums), scales};
    parallel(threads, [&packer, &header, threads](int32_t part) {
        const int64_t last = header.panels * (part + 1) / threads;
        for (int64_t panel = header.panels * part / threads; panel < last; ++panel) packer.panel(panel);
    });
    if (weight->outliers) {
        std::memcpy(at<int32_t>(scales, header.outlier_offsets), weight->outlier_offsets, (weight->rows + 1) * 4);
    }
    return PREQUANT_OK;
}

}  // extern "C"
