// Writing a call's results: what codes do not hold is added to the products, and the sums leave as the output.

#ifndef PREQUANT_RESULTS_H
#define PREQUANT_RESULTS_H

#include <cstring>

#include "activations.h"
#include "kernels.h"
#include "tokens.h"

namespace {

using namespace prequant;

// Calls `call` with the function of an activation.
template <class Call> inline void with_activation(int32_t activation, Call call) {
    switch (activation) {
        case PREQUANT_IDENTITY: return call([](Floats x) { return x; });
        case PREQUANT_RELU: return call([](Floats x) { return relu(x); });
        case PREQUANT_GELU: return call([](Floats x) { return gelu(x); });
        case PREQUANT_GELU_TANH: return call([](Floats x) { return gelu_tanh(x); });
    }
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

// The results of `count` rows of a token, in floats or bfloat16. Whole: they fill a vector.
template <bool Whole> Floats load_results(const float *from, int count) {
    return Whole ? load(from) : load_some(from, count);
}

template <bool Whole> Floats load_results(const uint16_t *from, int count) {
    FloatHalves halves{};
    std::memcpy(&halves, from, static_cast<size_t>(Whole ? kLanes : count) * sizeof(uint16_t));
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, FloatWords) << 16);
}

template <bool Whole> void store_results(Floats values, float *to, int count) {
    Whole ? store(to, values) : store_some(to, values, count);
}

// Rounded to nearest even; NaN stays NaN.
template <bool Whole> void store_results(Floats values, uint16_t *to, int count) {
    const auto bits = reinterpret_cast<FloatWords>(values);
    const FloatWords rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const FloatWords chosen = values == values ? rounded : bits >> 16 | 0x40;
    const auto halves = __builtin_convertvector(chosen, FloatHalves);
    std::memcpy(to, &halves, static_cast<size_t>(Whole ? kLanes : count) * sizeof(uint16_t));
}

// What turns the sums of a vector of rows into results; the same for every token. `count`: how many rows there are.
template <bool Whole> struct Finish {
    Floats offsets{}, bias{};

    Finish(const Job &job, int64_t row, int count) {
        const prequant_linear &linear = *job.linear;
        if (linear.bias) bias = load_results<Whole>(linear.bias + row, count);
        if (linear.input == PREQUANT_INPUT_STATIC) {
            offsets = load_results<Whole>(job.panels.sums + row, count) * linear.input_zero;
        }
    }

    Floats operator()(const float *sums, float scale) const {
        return (load(sums) - offsets) * scale + bias;
    }
};

// Scale, bias, activation and residual of `rows` rows of a panel from its `first` on, then the output.
template <bool Whole, class Value>
void write_rows(const Job &job, int64_t row, int first, int rows, int64_t token, int count,
                const float (*sums)[kPanelRows]) {
    row += first;
    const Finish<Whole> finish(job, row, rows);
    const int64_t width = job.panels.header->rows;
    const float *scales = job.scales + token;
    Value *to = static_cast<Value *>(job.output) + token * width + row;
    const Value *residual = job.residual ? static_cast<const Value *>(job.residual) + token * width + row : nullptr;
    with_activation(job.linear->activation, [&](auto activation) {
        for (int m = 0; m < count; ++m) {
            Floats values = activation(finish(sums[m] + first, scales[m]));
            if (residual) values += load_results<Whole>(residual + m * width, rows);
            store_results<Whole>(values, to + m * width, rows);
        }
    });
}

template <class Value>
void write_out(const Job &job, int64_t row, int rows, int64_t token, int count, const float (*sums)[kPanelRows]) {
    int first = 0;
    for (; first + kLanes <= rows; first += kLanes) {
        write_rows<true, Value>(job, row, first, kLanes, token, count, sums);
    }
    if (first < rows) write_rows<false, Value>(job, row, first, rows - first, token, count, sums);
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
    if (job.linear->type == PREQUANT_FLOAT32) {
        write_out<float>(job, row, rows, token, count, sums);
    } else {
        write_out<uint16_t>(job, row, rows, token, count, sums);
    }
}

}  // namespace

#endif
