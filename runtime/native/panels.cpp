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

PanelsHeader header_of(const prequant_weight &w) {
    PanelsHeader h{};
    std::memcpy(h.magic, kPanelsMagic, sizeof h.magic);
    h.version = kPanelsVersion;
    h.bits = w.bits;
    h.terms = w.terms;
    h.multiple = w.multiple;
    h.subtrahend = w.subtrahend;
    h.rows = w.rows;
    h.columns = w.columns;
    h.panels = round_up(w.rows, kPanelRows) / kPanelRows;
    h.blocks = blocks_of(w.columns);
    h.group_blocks = static_cast<int32_t>(w.group_size ? w.group_size / kBlockColumns : h.blocks);
    h.groups = w.group_size ? (w.columns + w.group_size - 1) / w.group_size : 1;
    h.outliers = w.outliers;
    int64_t end = round_up(sizeof(PanelsHeader), 64);
    const auto section = [&end](int64_t bytes) {
        const int64_t start = end;
        end = round_up(end + bytes, 64);
        return start;
    };
    const int64_t scales = h.panels * h.terms * h.groups * kPanelRows * 4;
    h.codes = section(h.panels * h.terms * h.blocks * h.bits * kVector);
    h.scales = section(scales);
    h.zeros = w.zeros ? section(scales) : 0;
    h.sums = section(h.panels * kPanelRows * 4);
    if (w.outliers) {
        h.outlier_offsets = section((w.rows + 1) * 4);
        h.outlier_columns = section(w.outliers * 4);
        h.outlier_values = section(w.outliers * 4);
    }
    h.bytes = end;
    return h;
}

template <class T> T *at(void *memory, int64_t offset) {
    return reinterpret_cast<T *>(static_cast<uint8_t *>(memory) + offset);
}

struct Packer {
    const prequant_weight &w;
    const PanelsHeader &h;
    void *out;
    NeutralCodes neutral;

    int64_t scale_index(int64_t term, int64_t row, int64_t group) const {
        if (w.shared_scale) return 0;
        return (term * w.rows + row) * h.groups + group;
    }

    float value(int64_t term, int64_t row, int64_t group, unsigned code) const {
        const int64_t i = scale_index(term, row, group);
        const float zero = w.zeros ? w.zeros[i] : static_cast<float>(w.subtrahend);
        return (static_cast<float>(w.multiple * static_cast<int>(code)) - zero) * w.scales[i];
    }

    void panel(int64_t panel) const {
        double sums[kPanelRows] = {};
        for (int64_t term = 0; term < h.terms; ++term) {
            uint8_t *codes = at<uint8_t>(out, h.codes) + (panel * h.terms + term) * h.blocks * h.bits * kVector;
            for (int64_t block = 0; block < h.blocks; ++block, codes += h.bits * kVector) {
                uint8_t unpacked[kPanelRows][kBlockColumns];
                for (int r = 0; r < kPanelRows; ++r) {
                    const int64_t row = panel * kPanelRows + r, first = block * kBlockColumns;
                    neutral.block(term, row, first, unpacked[r]);
                    if (row >= w.rows) continue;
                    for (int k = 0; k < kBlockColumns && first + k < w.columns; ++k) {
                        sums[r] += value(term, row, block / h.group_blocks, unpacked[r][k]);
                    }
                }
                write_block(unpacked, h.bits, codes);
            }
            scales(panel, term);
        }
        for (int r = 0; r < kPanelRows; ++r) {
            const int64_t row = panel * kPanelRows + r;
            if (w.outliers && row < w.rows) sums[r] += outliers(row);
            at<float>(out, h.sums)[row] = static_cast<float>(sums[r]);
        }
    }

    void scales(int64_t panel, int64_t term) const {
        for (int64_t group = 0; group < h.groups; ++group) {
            const int64_t place = ((panel * h.terms + term) * h.groups + group) * kPanelRows;
            for (int r = 0; r < kPanelRows; ++r) {
                const int64_t row = panel * kPanelRows + r;
                const bool inside = row < w.rows;
                const int64_t i = inside ? scale_index(term, row, group) : 0;
                at<float>(out, h.scales)[place + r] = inside ? w.scales[i] : 0.0f;
                if (!h.zeros) continue;
                const float zero = inside ? w.zeros[i] - static_cast<float>(w.subtrahend) : 0.0f;
                at<float>(out, h.zeros)[place + r] = zero;
            }
        }
    }

    // What a row's outliers add to the weight; returns their sum.
    double outliers(int64_t row) const {
        double sum = 0;
        for (int64_t i = w.outlier_offsets[row]; i < w.outlier_offsets[row + 1]; ++i) {
            const int64_t column = w.outlier_columns[i];
            float added = w.outlier_values[i];
            if (w.outliers_replace) {
                for (int64_t term = 0; term < h.terms; ++term) {
                    uint8_t codes[kBlockColumns];
                    const int64_t block = column / kBlockColumns;
                    neutral.block(term, row, block * kBlockColumns, codes);
                    added -= value(term, row, block / h.group_blocks, codes[column % kBlockColumns]);
                }
            }
            at<float>(out, h.outlier_values)[i] = added;
            at<int32_t>(out, h.outlier_columns)[i] = static_cast<int32_t>(column);
            sum += added;
        }
        return sum;
    }
};

}  // namespace

extern "C" {

PREQUANT_API int64_t prequant_panels_bytes(const prequant_weight *weight) {
    return makes_sense(*weight) ? header_of(*weight).bytes : -1;
}

PREQUANT_API int32_t prequant_pack_panels(const prequant_weight *weight, void *panels, int32_t threads) {
    if (threads < 1 || !makes_sense(*weight)) return PREQUANT_BAD_WEIGHT;
    const PanelsHeader header = header_of(*weight);
    for (int64_t i = 0; i < weight->outliers; ++i) {
        if (weight->outlier_columns[i] < 0 || weight->outlier_columns[i] >= weight->columns) return PREQUANT_BAD_WEIGHT;
    }
    for (int64_t row = 0; weight->outliers && row < weight->rows; ++row) {
        const int32_t *offsets = weight->outlier_offsets;
        if (offsets[0] != 0 || offsets[row] > offsets[row + 1] || offsets[weight->rows] != weight->outliers) {
            return PREQUANT_BAD_WEIGHT;
        }
    }
    std::memcpy(panels, &header, sizeof header);
    const Packer packer{*weight, header, panels, {*weight}};
    parallel(threads, [&packer, &header, threads](int32_t part) {
        const int64_t last = header.panels * (part + 1) / threads;
        for (int64_t panel = header.panels * part / threads; panel < last; ++panel) packer.panel(panel);
    });
    if (weight->outliers) {
        std::memcpy(at<int32_t>(panels, header.outlier_offsets), weight->outlier_offsets, (weight->rows + 1) * 4);
    }
    return PREQUANT_OK;
}

}  // extern "C"
