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

}  // namespace

#endif
