// Whether the tensors of a call fit its format, before any kernel sees them: runtime/checks.py in C++. Packages come
// from files, so nothing about a call is taken for granted, and this is the one place where that is seen to. Values are
// not looked at: kernels check those that they use as indices.

#ifndef PREQUANT_TORCH_CHECKS_H
#define PREQUANT_TORCH_CHECKS_H

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "format.h"

namespace prequant_torch {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A sparse float matrix by rows (CSR), added to a weight or put in place of what is there.
struct Outliers {
    Tensor values;       // [count]
    Tensor columns;      // [count] uint16 or int32
    Tensor row_offsets;  // [rows + 1] int32 or int64
    bool replace;
};

// A [rows, columns] weight, whose parts fit each other.
struct Weight {
    Format format;
    Tensor codes, scale;
    OptionalTensor zero_point;
    std::optional<Outliers> outliers;
    int64_t columns;

    int64_t rows() const { return codes.size(-2); }
};

// How the input of a product is quantized.
struct InputFormat {
    Format format;
    OptionalTensor scale;  // none: dynamic
    OptionalTensor zero_point;
};

enum class Activation { none, relu, gelu, gelu_tanh };

Weight checked_weight(const char *op, const std::string &format, int64_t columns, const Tensor &codes,
                      const Tensor &scale, const OptionalTensor &zero_point);

std::optional<Outliers> checked_outliers(const char *op, const OptionalTensor &values, const OptionalTensor &columns,
                                         const OptionalTensor &row_offsets, bool replace, int64_t rows);

// The format that an input is rounded to, once its scale fits it.
Format checked_rounding(const char *op, const std::string &format, const Tensor &input, const Tensor &scale,
                        const OptionalTensor &zero_point);

// None for the text "".
std::optional<InputFormat> checked_input(const char *op, const std::string &format, const Tensor &input,
                                         const OptionalTensor &scale, const OptionalTensor &zero_point);

void check_linear(const char *op, const Tensor &input, const Weight &weight, const OptionalTensor &bias,
                  const OptionalTensor &residual);

Activation checked_activation(const char *op, const std::string &name);

void check_ids(const char *op, const Tensor &ids);

}  // namespace prequant_torch

#endif
