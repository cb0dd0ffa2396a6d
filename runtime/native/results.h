// Writing a call's results: what codes do not hold is added to the products, and the sums leave as the output.

#ifndef PREQUANT_RESULTS_H
#define PREQUANT_RESULTS_H

#include <cstring>

#include "activations.h"
#include "kernels.h"
#include "tokens.h"

namespace {

using namespace prequant;

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

// What turns the sums of a panel's rows into results; the same for every token.
struct Finish {
    PanelRow offsets{}, bias{};

    Finish(const Job &job, int64_t row, int rows) {
        const prequant_linear &linear = *job.linear;
        const auto size = static_cast<size_t>(rows) * sizeof(float);
        if (linear.bias) std::memcpy(&bias, linear.bias + row, size);
        if (linear.input == PREQUANT_INPUT_STATIC) {
            std::memcpy(&offsets, job.panels.sums + row, size);
            offsets *= linear.input_zero;
        }
    }

    PanelRow operator()(const float *sums, float scale) const {
        PanelRow values;
        std::memcpy(&values, sums, sizeof values);
        return (values - offsets) * scale + bias;
    }
};

// Up to 16 results of a token, as floats or bfloat16, in `Value`s.
template <class Value> PanelRow load_results(const Value *from, size_t size) {
    if constexpr (sizeof(Value) == sizeof(float)) {
        PanelRow values{};
        std::memcpy(&values, from, size);
        return values;
    } else {
        PanelRowHalves halves{};
        std::memcpy(&halves, from, size);
        return reinterpret_cast<PanelRow>(__builtin_convertvector(halves, PanelRowWords) << 16);
    }
}

template <class Value> void store_results(PanelRow values, Value *to, size_t size) {
    if constexpr (sizeof(Value) == sizeof(float)) {
        std::memcpy(to, &values, size);
    } else {
        // Rounded to nearest even; NaN stays NaN.
        const auto bits = reinterpret_cast<PanelRowWords>(values);
        const PanelRowWords rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const PanelRowWords chosen = values == values ? rounded : bits >> 16 | 0x40;
        const auto halves = __builtin_convertvector(chosen, PanelRowHalves);
        std::memcpy(to, &halves, size);
    }
}

// Scale, bias, activation and residual, then the output. `Rows`: how many there are, or 0 if only `rows` knows: with a
// number the compiler knows that a row is a vector.
template <int Rows, class Value>
void write_out(const Job &job, int64_t row, int rows, int64_t token, int count, const float (*sums)[kPanelRows]) {
    const Finish finish(job, row, rows);
    const size_t size = static_cast<size_t>(Rows ? Rows : rows) * sizeof(Value);
    const int64_t width = job.panels.header->rows;
    const float *scales = job.scales + token;
    const int32_t activation = job.linear->activation;
    Value *to = static_cast<Value *>(job.output) + token * width + row;
    if (activation == PREQUANT_IDENTITY && !job.residual) {
        for (int m = 0; m < count; ++m) store_results(finish(sums[m], scales[m]), to + m * width, size);
        return;
    }
    const Value *residual = job.residual ? static_cast<const Value *>(job.residual) + token * width + row : nullptr;
    for (int m = 0; m < count; ++m) {
        PanelRow values = activate(activation, finish(sums[m], scales[m]));
        if (residual) values += load_results(residual + m * width, size);
        store_results(values, to + m * width, size);
    }
}

template <int Rows>
void write_out(const Job &job, int64_t row, int rows, int64_t token, int count, const float (*sums)[kPanelRows]) {
    if (job.linear->type == PREQUANT_FLOAT32) {
        write_out<Rows, float>(job, row, rows, token, count, sums);
    } else {
        write_out<Rows, uint16_t>(job, row, rows, token, count, sums);
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

}  // namespace

#endif
