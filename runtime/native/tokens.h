// Reading a call's inputs: tokens become rows of 8-bit codes with their scale, or of floats, padded with 0. Each unit that
// includes this gets a copy of its own, compiled with its own flags: hence the unnamed namespace, here and in the others.

#ifndef PREQUANT_TOKENS_H
#define PREQUANT_TOKENS_H

#include <cstring>

#include "activations.h"
#include "float_bits.h"
#include "kernels.h"

namespace {

using namespace prequant;

inline float from_bfloat16(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

// Rounded to nearest even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t quiet = bits >> 16 | 0x40, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// How a token is quantized: level = x / scale + zero, rounded and cut off at 0 and top, and its code is level - shift.
struct Grid {
    float scale, zero, top;
    int32_t shift;
    bool finite;
};

// `largest`: of the token's magnitudes, which compare as integers do; NaN and infinity come out on top.
inline Grid grid_of(const prequant_linear &linear, uint32_t largest) {
    const float half = static_cast<float>(linear.input_levels / 2);
    Grid grid{1.0f, half, static_cast<float>(linear.input_levels - 1), linear.input_levels / 2, true};
    if (linear.input == PREQUANT_INPUT_STATIC) {
        grid.scale = *linear.input_scale;
        grid.zero += linear.input_zero;
        grid.finite = largest <= kInfinity;  // infinity has a nearest level, NaN has none
    } else {
        grid.finite = largest < kInfinity;
        grid.scale = float_of(largest) / (half - 1.0f);
        if (grid.scale < kSmallestNormal) grid.scale = 1.0f;
    }
    return grid;
}

// ---- tokens ---------------------------------------------------------------------------------------------------------

struct Tokens {
    const Job &job;
    const prequant_linear &linear;
    int64_t columns;

    explicit Tokens(const Job &j) : job(j), linear(*j.linear), columns(j.panels.header->columns) {}

    void read(int64_t token) const {
        float *row = linear.input == PREQUANT_INPUT_FLOAT ? job.floats + token * job.stride : nullptr;
        if (linear.type == PREQUANT_FLOAT32) {
            const float *input = static_cast<const float *>(job.input) + token * columns;
            if (row) {
                std::memcpy(row, input, static_cast<size_t>(columns) * sizeof(float));
                finish_floats(token, row);
            } else {
                quantize(token, [input](int64_t k) { return input[k]; });
            }
            return;
        }
        const uint16_t *input = static_cast<const uint16_t *>(job.input) + token * columns;
        if (row) {
            for (int64_t k = 0; k < columns; ++k) row[k] = from_bfloat16(input[k]);
            finish_floats(token, row);
        } else {
            quantize(token, [input](int64_t k) { return from_bfloat16(input[k]); });
        }
    }

    void finish_floats(int64_t token, float *row) const {
        job.scales[token] = 1.0f;
        for (int64_t k = columns; k < job.stride; ++k) row[k] = 0.0f;
        if (job.panels.zeros) sum_groups(row, job.float_sums + token * job.panels.header->groups);
        if (job.float_columns) write_columns(token, row, job.float_columns);
    }

    template <class Value> void write_columns(int64_t token, const Value *row, Value *columns) const {
        columns += token / kTokenBlock * kTokenBlock * job.stride + token % kTokenBlock;
        for (int64_t k = 0; k < job.stride; ++k) columns[k * kTokenBlock] = row[k];
    }

    template <class Read> void quantize(int64_t token, Read read) const {
        int8_t *codes = job.codes + token * job.stride;
        uint32_t largest = 0;
        for (int64_t k = 0; k < columns; ++k) {
            const uint32_t magnitude = bits_of(read(k)) & kMagnitude;
            largest = magnitude > largest ? magnitude : largest;
        }
        const Grid grid = grid_of(linear, largest);
        if (!grid.finite) {
            std::memset(codes, 0, static_cast<size_t>(job.stride));
            job.scales[token] = float_of(kNotANumber);
        } else {
            for (int64_t k = 0; k < columns; ++k) {
                float level = read(k) / grid.scale + grid.zero;
                level = level < 0.0f ? 0.0f : level;
                level = level > grid.top ? grid.top : level;
                codes[k] = static_cast<int8_t>(static_cast<int32_t>(bits_of(level + kRounding) - bits_of(kRounding)) -
                                               grid.shift);
            }
            std::memset(codes + columns, 0, static_cast<size_t>(job.stride - columns));
            job.scales[token] = grid.scale;
        }
        const PanelsHeader &h = *job.panels.header;
        const int32_t *sums = job.sums + token * h.groups;
        sum_groups(codes, job.sums + token * h.groups);
        for (int64_t g = 0; g < h.groups; ++g) job.offsets[token * h.groups + g] = -h.subtrahend * sums[g];
        if (job.code_columns) write_columns(token, codes, job.code_columns);
    }

    template <class Value, class Sum> void sum_groups(const Value *row, Sum *sums) const {
        const PanelsHeader &h = *job.panels.header;
        const int64_t width = static_cast<int64_t>(h.group_blocks) * kBlockColumns;
        for (int64_t g = 0; g < h.groups; ++g) {
            const int64_t last = (g + 1) * width < job.stride ? (g + 1) * width : job.stride;
            Sum sum = 0;
            for (int64_t k = g * width; k < last; ++k) sum += row[k];
            sums[g] = sum;
        }
    }
};

inline void read_all_tokens(const Job &job, int64_t first, int64_t last) {
    const Tokens tokens(job);
    for (int64_t token = first; token < last; ++token) tokens.read(token);
}

}  // namespace

#endif
