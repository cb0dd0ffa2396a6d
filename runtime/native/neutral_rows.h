// From the neutral layout of formats.py to floats, row by row. Like panel_kernels.h, each unit compiles a copy of its own.

#ifndef PREQUANT_NEUTRAL_ROWS_H
#define PREQUANT_NEUTRAL_ROWS_H

#include <cstring>

#include "kernels.h"

namespace {

using namespace prequant;

constexpr int64_t kCodesAtOnce = 128;

// Codes [first, first + count) of a row, one to a byte. `first` is a multiple of 8, so that every width begins on a byte.
template <int Bits> void codes_of(const uint8_t *row, int64_t first, int64_t count, uint8_t *codes) {
    constexpr int kMask = (1 << Bits) - 1;
    if (8 % Bits == 0) {
        constexpr int kCodes = 8 / Bits;
        const uint8_t *bytes = row + first / kCodes;
        const int64_t whole = count / kCodes;
        for (int64_t i = 0; i < whole; ++i) {
            for (int p = 0; p < kCodes; ++p) codes[i * kCodes + p] = static_cast<uint8_t>(bytes[i] >> (p * Bits) & kMask);
        }
        for (int64_t i = whole * kCodes; i < count; ++i) {
            codes[i] = static_cast<uint8_t>(bytes[whole] >> (i % kCodes * Bits) & kMask);
        }
        return;
    }
    const uint8_t *bytes = row + first * Bits / 8;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t bit = i * Bits;
        uint32_t word = bytes[bit / 8];
        if (bit % 8 + Bits > 8) word |= static_cast<uint32_t>(bytes[bit / 8 + 1]) << 8;
        codes[i] = static_cast<uint8_t>(word >> (bit % 8) & kMask);
    }
}

inline void trits_of(const uint8_t *row, int64_t first, int64_t count, uint8_t *codes) {
    static constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
    for (int64_t i = 0; i < count; ++i) {
        const int64_t column = first + i;
        codes[i] = static_cast<uint8_t>(row[column / 5] / kPowers[column % 5] % 3);
    }
}

inline void unpack_codes(const prequant_weight &w, const uint8_t *row, int64_t first, int64_t count, uint8_t *codes) {
    if (w.base3) return trits_of(row, first, count, codes);
    switch (w.bits) {
        case 1: return codes_of<1>(row, first, count, codes);
        case 2: return codes_of<2>(row, first, count, codes);
        case 3: return codes_of<3>(row, first, count, codes);
        case 4: return codes_of<4>(row, first, count, codes);
        case 5: return codes_of<5>(row, first, count, codes);
        case 6: return codes_of<6>(row, first, count, codes);
        case 7: return codes_of<7>(row, first, count, codes);
        case 8: return codes_of<8>(row, first, count, codes);
    }
}

// One row as floats, outliers aside: the sum of its terms, each (multiple * u - zero) * scale.
inline void dequantize_row(const prequant_weight &w, int64_t row, float *out) {
    const int64_t row_bytes = w.base3 ? (w.columns + 4) / 5 : (w.columns * w.bits + 7) / 8;
    const int64_t width = w.group_size ? w.group_size : w.columns;
    const int64_t groups = (w.columns + width - 1) / width;
    uint8_t codes[kCodesAtOnce];
    for (int64_t term = 0; term < w.terms; ++term) {
        const uint8_t *bytes = w.codes + (term * w.rows + row) * row_bytes;
        const int64_t scales = w.shared_scale ? 0 : (term * w.rows + row) * groups;
        // Steps end where a group does, and begin on a byte.
        for (int64_t first = 0; first < w.columns;) {
            const int64_t group = first / width;
            const int64_t end_of_group = (group + 1) * width < w.columns ? (group + 1) * width : w.columns;
            const int64_t count = end_of_group - first < kCodesAtOnce ? end_of_group - first : kCodesAtOnce;
            unpack_codes(w, bytes, first, count, codes);
            const float scale = w.scales[scales + group];
            const float zero = w.zeros ? w.zeros[scales + group] : static_cast<float>(w.subtrahend);
            const float multiple = static_cast<float>(w.multiple);
            float *to = out + first;
            if (term == 0) {
                for (int64_t i = 0; i < count; ++i) to[i] = (static_cast<float>(codes[i]) * multiple - zero) * scale;
            } else {
                for (int64_t i = 0; i < count; ++i) to[i] += (static_cast<float>(codes[i]) * multiple - zero) * scale;
            }
            first += count;
        }
    }
}

inline void dequantize_rows(const prequant_weight &w, const int64_t *rows, int64_t first, int64_t last, float *out) {
    for (int64_t i = first; i < last; ++i) dequantize_row(w, rows ? rows[i] : i, out + i * w.columns);
}

}  // namespace

#endif
