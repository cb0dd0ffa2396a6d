// The kernels on panels (panels.h), written once over the vectors V of an instruction set. Each unit that includes this
// gets a copy of its own, compiled with its own flags: hence the unnamed namespace.
//
// V::kRows   rows of a panel that a vector holds: 16, or 8 for half a panel at a time
// V::kChains accumulators that an integer product of one token is spread over, so that none waits for the last
// V::kTokens, V::kFloatTokens  tokens that are multiplied with codes unpacked once

#ifndef PREQUANT_PANEL_KERNELS_H
#define PREQUANT_PANEL_KERNELS_H

#include <cstring>

#include "activations.h"
#include "kernels.h"
#include "neutral_rows.h"

namespace {

using namespace prequant;

// A unit that is to be small rather than fast defines these as less.
#ifndef PREQUANT_INLINE
#define PREQUANT_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define PREQUANT_UNROLL _Pragma("unroll")
#else
#define PREQUANT_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

// ---- numbers --------------------------------------------------------------------------------------------------------

PREQUANT_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

PREQUANT_INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

PREQUANT_INLINE float from_bfloat16(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

// Rounded to nearest even; NaN stays NaN.
PREQUANT_INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t quiet = bits >> 16 | 0x40, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
constexpr float kSmallestNormal = 1.17549435e-38f;

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
        const float half = static_cast<float>(linear.input_levels / 2);
        const float top = static_cast<float>(linear.input_levels - 1);
        float scale, zero = half;
        bool finite = true;
        if (linear.input == PREQUANT_INPUT_STATIC) {
            scale = *linear.input_scale;
            zero += linear.input_zero;
            uint32_t largest = 0;
            for (int64_t k = 0; k < columns; ++k) {
                const uint32_t magnitude = bits_of(read(k)) & kMagnitude;
                largest = magnitude > largest ? magnitude : largest;
            }
            finite = largest <= kInfinity;  // infinity has a nearest level, NaN has none
        } else {
            // Magnitudes compare as integers do, and NaN and infinity come out on top.
            uint32_t largest = 0;
            for (int64_t k = 0; k < columns; ++k) {
                const uint32_t magnitude = bits_of(read(k)) & kMagnitude;
                largest = magnitude > largest ? magnitude : largest;
            }
            finite = largest < kInfinity;
            scale = float_of(largest) / (half - 1.0f);
            if (scale < kSmallestNormal) scale = 1.0f;
        }
        if (!finite) {
            std::memset(codes, 0, static_cast<size_t>(job.stride));
            job.scales[token] = float_of(0x7fc00000);
        } else {
            const int32_t shift = static_cast<int32_t>(half);
            for (int64_t k = 0; k < columns; ++k) {
                float level = read(k) / scale + zero;
                level = level < 0.0f ? 0.0f : level;
                level = level > top ? top : level;
                const int32_t code = static_cast<int32_t>(bits_of(level + kRounding) - bits_of(kRounding)) - shift;
                codes[k] = static_cast<int8_t>(code);
            }
            std::memset(codes + columns, 0, static_cast<size_t>(job.stride - columns));
            job.scales[token] = scale;
        }
        sum_groups(codes, job.sums + token * job.panels.header->groups);
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

// ---- what comes after the products ----------------------------------------------------------------------------------

inline PanelRow activate(int32_t activation, PanelRow values) {
    switch (activation) {
        case PREQUANT_RELU: return relu(values);
        case PREQUANT_GELU: return gelu(values);
        case PREQUANT_GELU_TANH: return gelu_tanh(values);
    }
    return values;
}

// Adds the outliers' products of some rows with `count` tokens, which begin at `inputs`.
template <class Value>
void add_outliers(const Job &job, const Value *inputs, int64_t row, int rows, int count, float (*sums)[kPanelRows]) {
    for (int r = 0; r < rows; ++r) {
        const int32_t *offsets = job.panels.outlier_offsets + row + r;
        for (int32_t i = offsets[0]; i < offsets[1]; ++i) {
            const Value *column = inputs + job.panels.outlier_columns[i];
            for (int m = 0; m < count; ++m) {
                sums[m][r] += job.panels.outlier_values[i] * static_cast<float>(column[m * job.stride]);
            }
        }
    }
}

// The same from inputs by columns, where all tokens of a block lie side by side; `count` does not leave the block.
template <class Value>
void add_outliers_by_columns(const Job &job, const Value *columns, int64_t row, int rows, int64_t token, int count,
                             float (*sums)[kPanelRows]) {
    columns += token / kTokenBlock * kTokenBlock * job.stride + token % kTokenBlock;
    alignas(64) float of_row[kPanelRows][kTokenBlock];
    for (int r = 0; r < rows; ++r) {
        const int32_t *offsets = job.panels.outlier_offsets + row + r;
        for (int m = 0; m < count; ++m) of_row[r][m] = 0.0f;
        for (int32_t i = offsets[0]; i < offsets[1]; ++i) {
            const Value *column = columns + job.panels.outlier_columns[i] * kTokenBlock;
            const float value = job.panels.outlier_values[i];
            if (count == kTokenBlock) {  // as a number the compiler knows
                for (int m = 0; m < kTokenBlock; ++m) of_row[r][m] += value * static_cast<float>(column[m]);
            } else {
                for (int m = 0; m < count; ++m) of_row[r][m] += value * static_cast<float>(column[m]);
            }
        }
    }
    for (int m = 0; m < count; ++m) {
        for (int r = 0; r < rows; ++r) sums[m][r] += of_row[r][m];
    }
}

// Scale, bias, activation and residual, then the output. Rows: how many there are, or 0 if only `rows` knows: with a
// number the compiler makes one vector of them.
template <int Rows>
void write_out(const Job &job, int64_t row, int rows_left, int64_t token, int count, float (*sums)[kPanelRows]) {
    const int rows = Rows ? Rows : rows_left;
    const prequant_linear &linear = *job.linear;
    const int64_t width = job.panels.header->rows;
    alignas(64) float offsets[kPanelRows] = {}, bias[kPanelRows] = {};
    for (int r = 0; linear.bias && r < rows; ++r) bias[r] = linear.bias[row + r];
    if (linear.input == PREQUANT_INPUT_STATIC) {
        for (int r = 0; r < rows; ++r) offsets[r] = linear.input_zero * job.panels.sums[row + r];
    }
    for (int m = 0; m < count; ++m) {
        const float scale = linear.input == PREQUANT_INPUT_FLOAT ? 1.0f : job.scales[token + m];
        // In an array of its own, which can't overlap the output: the compiler may keep it in a register.
        alignas(64) float values[kPanelRows];
        for (int r = 0; r < kPanelRows; ++r) values[r] = (sums[m][r] - offsets[r]) * scale + bias[r];
        if (linear.activation != PREQUANT_IDENTITY) {
            PanelRow row_of_panel;
            std::memcpy(&row_of_panel, values, sizeof values);
            row_of_panel = activate(linear.activation, row_of_panel);
            std::memcpy(values, &row_of_panel, sizeof values);
        }
        const int64_t place = (token + m) * width + row;
        const auto size = static_cast<size_t>(rows);
        if (linear.type == PREQUANT_FLOAT32) {
            if (job.residual) {
                alignas(64) float residual[kPanelRows] = {};
                std::memcpy(residual, static_cast<const float *>(job.residual) + place, size * sizeof(float));
                for (int r = 0; r < kPanelRows; ++r) values[r] += residual[r];
            }
            std::memcpy(static_cast<float *>(job.output) + place, values, size * sizeof(float));
        } else {
            alignas(32) uint16_t halves[kPanelRows] = {};
            if (job.residual) {
                std::memcpy(halves, static_cast<const uint16_t *>(job.residual) + place, size * sizeof(uint16_t));
                for (int r = 0; r < kPanelRows; ++r) values[r] += from_bfloat16(halves[r]);
            }
            for (int r = 0; r < kPanelRows; ++r) halves[r] = to_bfloat16(values[r]);
            std::memcpy(static_cast<uint16_t *>(job.output) + place, halves, size * sizeof(uint16_t));
        }
    }
}

// Adds what codes do not hold to `sums` [tokens][16] of a panel's rows, and writes them out.
inline void finish(const Job &job, int64_t panel, int64_t token, int count, float (*sums)[kPanelRows]) {
    const PanelsHeader &h = *job.panels.header;
    const int64_t row = panel * kPanelRows;
    const int rows = static_cast<int>(h.rows - row < kPanelRows ? h.rows - row : kPanelRows);
    const bool integers = job.linear->input != PREQUANT_INPUT_FLOAT;
    if (job.panels.outlier_offsets) {
        if (job.code_columns) {
            add_outliers_by_columns(job, job.code_columns, row, rows, token, count, sums);
        } else if (job.float_columns) {
            add_outliers_by_columns(job, job.float_columns, row, rows, token, count, sums);
        } else if (integers) {
            add_outliers(job, job.codes + token * job.stride, row, rows, count, sums);
        } else {
            add_outliers(job, job.floats + token * job.stride, row, rows, count, sums);
        }
    }
    if (rows == kPanelRows) {
        write_out<kPanelRows>(job, row, rows, token, count, sums);
    } else {
        write_out<0>(job, row, rows, token, count, sums);
    }
}

// ---- products -------------------------------------------------------------------------------------------------------

// Sums of codes times 8-bit inputs over the blocks of a group: the part of one plane of W bits, for M tokens.
template <class V, int W, int M> struct IntegerPlane {
    static constexpr int kChains = V::kChains / M > 0 ? V::kChains / M : 1;
    static constexpr int kCodes = 8 / W;  // in a byte
    // With a chain for each position in the byte, codes may stay at their bits: the sum is shifted once, at the end.
    static constexpr bool kInPlace = V::kInPlace && kChains % kCodes == 0;

    typename V::Ints sums[M][kChains];

    PREQUANT_INLINE void clear() {
        for (int m = 0; m < M; ++m) {
            for (int c = 0; c < kChains; ++c) sums[m][c] = V::zero();
        }
    }

    PREQUANT_INLINE void add(const uint8_t *plane, const int8_t *inputs, int64_t stride) {
        PREQUANT_UNROLL
        for (int v = 0; v < W; ++v) {
            const typename V::Codes bytes = V::load(plane + v * kVector);
            PREQUANT_UNROLL
            for (int p = 0; p < kCodes; ++p) {
                const int quad = v * kCodes + p;
                const auto codes = kInPlace ? V::template masked<W>(bytes, p) : V::template low<W>(bytes, p);
                PREQUANT_UNROLL
                for (int m = 0; m < M; ++m) {
                    auto &sum = sums[m][quad % kChains];
                    sum = V::template dot<kInPlace ? 8 : W>(sum, codes, inputs + m * stride + 4 * quad);
                }
            }
        }
    }

    PREQUANT_INLINE typename V::Ints total(int m) const {
        typename V::Ints sum = V::zero();
        for (int c = 0; c < kChains; ++c) sum = V::add(sum, kInPlace ? V::right(sums[m][c], c % kCodes * W) : sums[m][c]);
        return sum;
    }
};

// Nothing: what a list of planes ends with.
template <class V, int M> struct IntegerPlane<V, 0, M> {
    PREQUANT_INLINE void clear() {}
    PREQUANT_INLINE void add(const uint8_t *, const int8_t *, int64_t) {}
    PREQUANT_INLINE typename V::Ints total(int) const { return V::zero(); }
};

template <class V, int B, int M>
void integer_panel(const Job &job, int64_t panel, int64_t token, float (*out)[kPanelRows]) {
    constexpr Planes P = planes_of(B);
    const PanelsHeader &h = *job.panels.header;
    const int8_t *inputs = job.codes + token * job.stride;
    for (int half = 0; half < kPanelRows / V::kRows; ++half) {
        typename V::Floats sums[M];
        for (int m = 0; m < M; ++m) sums[m] = V::float_zero();
        for (int64_t term = 0; term < h.terms; ++term) {
            const int64_t place = panel * h.terms + term;
            const uint8_t *codes = job.panels.codes + place * h.blocks * B * kVector + half * 4 * V::kRows;
            for (int64_t g = 0; g < h.groups; ++g) {
                const int64_t first = g * h.group_blocks, end = first + h.group_blocks;
                IntegerPlane<V, P.width[0], M> lowest;
                IntegerPlane<V, P.width[1], M> middle;
                IntegerPlane<V, P.width[2], M> highest;
                lowest.clear();
                middle.clear();
                highest.clear();
                for (int64_t block = first; block < (end < h.blocks ? end : h.blocks); ++block) {
                    const uint8_t *planes = codes + block * B * kVector;
                    const int8_t *of_block = inputs + block * kBlockColumns;
                    lowest.add(planes, of_block, job.stride);
                    middle.add(planes + P.width[0] * kVector, of_block, job.stride);
                    highest.add(planes + (P.width[0] + P.width[1]) * kVector, of_block, job.stride);
                }
                const int64_t of_group = (place * h.groups + g) * kPanelRows + half * V::kRows;
                for (int m = 0; m < M; ++m) {
                    const int32_t input_sum = job.sums[(token + m) * h.groups + g];
                    auto total = V::add(lowest.total(m), V::left(middle.total(m), P.width[0]));
                    total = V::add(total, V::left(highest.total(m), P.width[0] + P.width[1]));
                    total = V::subtract(h.multiple == 2 ? V::add(total, total) : total, h.subtrahend * input_sum);
                    auto value = V::to_float(total);
                    if (job.panels.zeros) {
                        value = V::negative_multiply_add(V::load_floats(job.panels.zeros + of_group),
                                                         V::spread(static_cast<float>(input_sum)), value);
                    }
                    sums[m] = V::multiply_add(value, V::load_floats(job.panels.scales + of_group), sums[m]);
                }
            }
        }
        for (int m = 0; m < M; ++m) V::store(out[m] + half * V::kRows, sums[m]);
    }
}

// The same for inputs that stay float: codes become floats by `levels`, what each code of the plane stands for.
template <class V, int W, int M> struct FloatPlane {
    static constexpr int kCodes = 8 / W;

    typename V::template Levels<W> levels;

    PREQUANT_INLINE void prepare(int low, int multiple, int subtrahend) {
        levels = V::template levels<W>(multiple << low, low ? 0 : subtrahend);
    }

    PREQUANT_INLINE void add(typename V::Floats (&sums)[M], const uint8_t *plane, const float *inputs, int64_t stride) {
        for (int v = 0; v < W; ++v) {
            const typename V::Codes bytes = V::load(plane + v * kVector);
            PREQUANT_UNROLL
            for (int p = 0; p < kCodes; ++p) {
                PREQUANT_UNROLL
                for (int j = 0; j < 4; ++j) {
                    const auto codes = V::template value<W>(bytes, 8 * j + p * W, levels);
                    const float *column = inputs + 4 * (v * kCodes + p) + j;
                    PREQUANT_UNROLL
                    for (int m = 0; m < M; ++m) {
                        sums[m] = V::multiply_add(codes, V::spread(column[m * stride]), sums[m]);
                    }
                }
            }
        }
    }
};

template <class V, int M> struct FloatPlane<V, 0, M> {
    PREQUANT_INLINE void prepare(int, int, int) {}
    PREQUANT_INLINE void add(typename V::Floats (&)[M], const uint8_t *, const float *, int64_t) {}
};

template <class V, int B, int M>
void float_panel(const Job &job, int64_t panel, int64_t token, float (*out)[kPanelRows]) {
    constexpr Planes P = planes_of(B);
    const PanelsHeader &h = *job.panels.header;
    const float *inputs = job.floats + token * job.stride;
    FloatPlane<V, P.width[0], M> lowest;
    FloatPlane<V, P.width[1], M> middle;
    FloatPlane<V, P.width[2], M> highest;
    lowest.prepare(0, h.multiple, h.subtrahend);
    middle.prepare(P.width[0], h.multiple, h.subtrahend);
    highest.prepare(P.width[0] + P.width[1], h.multiple, h.subtrahend);
    for (int half = 0; half < kPanelRows / V::kRows; ++half) {
        typename V::Floats sums[M];
        for (int m = 0; m < M; ++m) sums[m] = V::float_zero();
        for (int64_t term = 0; term < h.terms; ++term) {
            const int64_t place = panel * h.terms + term;
            const uint8_t *codes = job.panels.codes + place * h.blocks * B * kVector + half * 4 * V::kRows;
            for (int64_t g = 0; g < h.groups; ++g) {
                const int64_t first = g * h.group_blocks, end = first + h.group_blocks;
                typename V::Floats group[M];
                for (int m = 0; m < M; ++m) group[m] = V::float_zero();
                for (int64_t block = first; block < (end < h.blocks ? end : h.blocks); ++block) {
                    const uint8_t *planes = codes + block * B * kVector;
                    const float *of_block = inputs + block * kBlockColumns;
                    lowest.add(group, planes, of_block, job.stride);
                    middle.add(group, planes + P.width[0] * kVector, of_block, job.stride);
                    highest.add(group, planes + (P.width[0] + P.width[1]) * kVector, of_block, job.stride);
                }
                const int64_t of_group = (place * h.groups + g) * kPanelRows + half * V::kRows;
                const auto scales = V::load_floats(job.panels.scales + of_group);
                for (int m = 0; m < M; ++m) {
                    if (job.panels.zeros) {
                        const float input_sum = job.float_sums[(token + m) * h.groups + g];
                        group[m] = V::negative_multiply_add(V::load_floats(job.panels.zeros + of_group),
                                                            V::spread(input_sum), group[m]);
                    }
                    sums[m] = V::multiply_add(group[m], scales, sums[m]);
                }
            }
        }
        for (int m = 0; m < M; ++m) V::store(out[m] + half * V::kRows, sums[m]);
    }
}

// ---- all tokens -----------------------------------------------------------------------------------------------------

template <class V, int B, int M>
int64_t tokens_of(const Job &job, int64_t panel, int64_t token) {
    float sums[M][kPanelRows];
    for (; token + M <= job.tokens; token += M) {
        if (job.linear->input == PREQUANT_INPUT_FLOAT) {
            float_panel<V, B, M>(job, panel, token, sums);
        } else {
            integer_panel<V, B, M>(job, panel, token, sums);
        }
        finish(job, panel, token, M, sums);
    }
    return token;
}

template <class V, int B> void panels_of_bits(const Job &job, int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
        int64_t token = tokens_of<V, B, V::kTokens>(job, panel, 0);
        token = tokens_of<V, B, 4>(job, panel, token);
        token = tokens_of<V, B, 2>(job, panel, token);
        tokens_of<V, B, 1>(job, panel, token);
    }
}

template <class V> void linear_by_panels(const Job &job, int64_t first, int64_t last, uint8_t *) {
    switch (job.panels.header->bits) {
        case 1: return panels_of_bits<V, 1>(job, first, last);
        case 2: return panels_of_bits<V, 2>(job, first, last);
        case 3: return panels_of_bits<V, 3>(job, first, last);
        case 4: return panels_of_bits<V, 4>(job, first, last);
        case 5: return panels_of_bits<V, 5>(job, first, last);
        case 6: return panels_of_bits<V, 6>(job, first, last);
        case 7: return panels_of_bits<V, 7>(job, first, last);
        case 8: return panels_of_bits<V, 8>(job, first, last);
    }
}

inline int64_t no_own_bytes(const Panels &, const prequant_linear &, int64_t) { return 0; }

}  // namespace

#endif
