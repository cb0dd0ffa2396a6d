// What the operators mean, in ATen: runtime/reference.py in C++, for calls that the native kernels do not take. Slower
// than float32, and right for every format and type. All arguments have gone through checks.h.

#ifndef PREQUANT_TORCH_REFERENCE_H
#define PREQUANT_TORCH_REFERENCE_H

#include "checks.h"

namespace prequant_torch::reference {

// Packed codes [..., row_bytes] of an input [..., columns]. Throws for NaN.
Tensor quantize(const char *op, const Tensor &input, const Tensor &scale, const OptionalTensor &zero_point,
                const Format &format);

// The input rounded to the levels of the scale's magnitude, in its own type.
Tensor fake_quantize(const Tensor &input, const Tensor &scale, const OptionalTensor &zero_point, const Format &format);

// The scale that just covers each token, or the whole input.
Tensor dynamic_scale(const char *op, const Tensor &input, const Format &format);

// A scale that was learned may have crossed 0: its magnitude counts.
Tensor positive_scale(const Tensor &scale, const Format &format);

// The weight [rows, columns] in its scale's type, outliers aside.
Tensor dequantize(const Weight &weight);

// Adds the outliers to a weight [rows, columns], or puts them in place of what is there. With `rows`, int64 [count], it
// holds those rows alone. Throws for outliers outside of the weight.
void add_outliers_(const char *op, const Tensor &weight, const Outliers &outliers, const OptionalTensor &rows);

// activation(linear(quantized input, weight, bias)) + residual for a weight [rows, columns] of floats.
Tensor linear(const char *op, const Tensor &weight, const Tensor &input, const OptionalTensor &bias,
              const std::optional<InputFormat> &input_format, Activation activation, const OptionalTensor &residual);

// Throws c10::IndexError for ids, int64 [count], outside a table of so many rows.
void check_range(const char *op, const Tensor &ids, int64_t rows);

// The weight's rows `ids`, all of which it has, outliers aside, in its scale's type.
Tensor dequantize_rows(const Weight &weight, const Tensor &ids);

}  // namespace prequant_torch::reference

#endif
