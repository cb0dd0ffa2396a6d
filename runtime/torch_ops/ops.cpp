// The operators torch.ops.prequant.* for a process without Python: registered when this library is loaded, under the
// schemas of runtime/ops.py, which registers them in a process that has Python (one process takes one of the two). All
// are for inference on the CPU; fake_quantize_gradients and dequantize_gradients, which a backward alone calls, are not
// among them.

#include <torch/library.h>

#include "checks.h"
#include "errors.h"
#include "native.h"
#include "reference.h"

namespace prequant_torch {

namespace {

using Text = std::string;
using OptionalType = std::optional<at::ScalarType>;
using Tensors = at::TensorList;
using OptionalTensors = c10::List<OptionalTensor>;

// The weight as floats [rows, columns], outliers aside.
Tensor floats_of(const char *op, const Weight &weight) {
    return native::takes_rows(weight) ? native::dequantize(op, weight, std::nullopt) : reference::dequantize(weight);
}

Tensor quantize(const Tensor &input, const Tensor &scale, const OptionalTensor &zero_point, Text text) {
    const char *op = "quantize";
    const Format format = checked_rounding(op, text, input, scale, zero_point);
    return reference::quantize(op, input, scale, zero_point, format);
}

// Codes [..., rows, row_bytes] of an activation, or of their scales, as those of a matrix.
Tensor as_rows(const char *op, const Format &format, const Tensor &codes, const Tensor &scales) {
    if (format.granularity == Granularity::tensor) return scales;
    const auto rows = codes.sizes().slice(0, codes.dim() - 1);
    PREQUANT_CHECK(scales.dim() == codes.dim() && scales.sizes().slice(0, rows.size()) == rows, format.text(),
                   ": codes ", codes.sizes(), " have other rows than scales ", scales.sizes());
    return scales.flatten(0, -2);
}

Tensor dequantize_as(const char *op, const Tensor &codes, const Tensor &scale, const OptionalTensor &zero_point,
                     const Text &text, int64_t columns, OptionalType dtype) {
    const auto type = dtype.value_or(scale.scalar_type());
    const Format format = parse(op, text);
    if (codes.dim() <= 2 || format.scheme == Scheme::bcq) {
        return floats_of(op, checked_weight(op, text, columns, codes, scale, zero_point)).to(type);
    }
    const OptionalTensor zeros =
        zero_point ? OptionalTensor(as_rows(op, format, codes, *zero_point)) : std::nullopt;
    const Weight weight =
        checked_weight(op, text, columns, codes.flatten(0, -2), as_rows(op, format, codes, scale), zeros);
    auto shape = codes.sizes().vec();
    shape.back() = columns;
    return floats_of(op, weight).to(type).reshape(shape);
}

Tensor dequantize(const Tensor &codes, const Tensor &scale, const OptionalTensor &zero_point, Text format,
                  int64_t columns, OptionalType dtype) {
    return dequantize_as("dequantize", codes, scale, zero_point, format, columns, dtype);
}

Tensor dequantize_bcq(const Tensor &planes, const Tensor &alphas, Text format, int64_t columns, OptionalType dtype) {
    return dequantize_as("dequantize_bcq", planes, alphas, std::nullopt, format, columns, dtype);
}

Tensor fake_quantize(const Tensor &input, const Tensor &scale, const OptionalTensor &zero_point, Text text, bool,
                     bool) {
    const char *op = "fake_quantize";
    const Format format = checked_rounding(op, text, input, scale, zero_point);
    if (native::takes_rounding(format, input, scale, zero_point)) {
        return native::fake_quantize(op, input, scale, zero_point, format);
    }
    return reference::fake_quantize(input, scale, zero_point, format);
}

Tensor dynamic_scale(const Tensor &input, Text text) {
    const char *op = "dynamic_scale";
    return reference::dynamic_scale(op, input, parse(op, text));
}

Tensor uncalibrated(const Tensor &, Text, Text observer, Text name) {
    const char *op = "uncalibrated";
    PREQUANT_CHECK(false, "the activation '", name, "' has no scale yet: calibrate the program before it runs ",
                   "(observer '", observer, "')");
}

Tensor scale_gradient(const Tensor &input, double) { return input.clone(); }

Tensor add_outliers(const Tensor &weight, const Tensor &values, const Tensor &columns, const Tensor &row_offsets,
                    bool replace) {
    const char *op = "add_outliers";
    PREQUANT_CHECK(weight.dim() == 2 && weight.is_floating_point() && weight.is_cpu(),
                   "a weight is a matrix of floats on the CPU, not ", weight.sizes(), " of ", weight.scalar_type());
    const auto outliers = checked_outliers(op, values, columns, row_offsets, replace, weight.size(0));
    Tensor changed = weight.clone();
    reference::add_outliers_(op, changed, *outliers, std::nullopt);
    return changed;
}

// ---- packed ---------------------------------------------------------------------------------------------------------

Tensor run_reference(const char *op, const native::Linear &linear, const Tensor &input,
                     const OptionalTensor &residual) {
    const Tensor weight = floats_of(op, linear.weight);
    if (linear.weight.outliers) reference::add_outliers_(op, weight, *linear.weight.outliers, std::nullopt);
    return reference::linear(op, weight, input, linear.bias, linear.input_format, linear.activation, residual);
}

Tensor packed_linear(const Tensor &input, const Tensor &codes, const Tensor &scale, const OptionalTensor &zero_point,
                     const OptionalTensor &values, const OptionalTensor &places, const OptionalTensor &offsets,
                     bool replace, const OptionalTensor &bias, const OptionalTensor &input_scale,
                     const OptionalTensor &input_zero, const OptionalTensor &residual, Text format, int64_t columns,
                     Text input_format, Text activation) {
    const char *op = "packed_linear";
    Weight weight = checked_weight(op, format, columns, codes, scale, zero_point);
    check_linear(op, input, weight, bias, residual);
    weight.outliers = checked_outliers(op, values, places, offsets, replace, weight.rows());
    auto quantized = checked_input(op, input_format, input, input_scale, input_zero);
    const native::Linear linear{std::move(weight), bias, std::move(quantized), checked_activation(op, activation)};
    if (native::takes_linear(linear, input)) return native::run(op, {linear}, input, residual).front();
    return run_reference(op, linear, input, residual);
}

std::vector<Tensor> packed_linears(const Tensor &input, Tensors codes, Tensors scales, OptionalTensors zero_points,
                                   OptionalTensors values, OptionalTensors places, OptionalTensors offsets,
                                   c10::List<bool> replace, OptionalTensors biases, const OptionalTensor &input_scale,
                                   const OptionalTensor &input_zero, c10::List<Text> formats,
                                   c10::List<Text> activations, int64_t columns, Text input_format) {
    const char *op = "packed_linears";
    const size_t count = codes.size();
    PREQUANT_CHECK(count > 0, "it takes at least one linear");
    const std::pair<const char *, size_t> lists[] = {
        {"scales", scales.size()},           {"zero_points", zero_points.size()},
        {"outlier_values", values.size()},   {"outlier_columns", places.size()},
        {"outlier_row_offsets", offsets.size()}, {"outliers_replace", replace.size()},
        {"biases", biases.size()},           {"formats", formats.size()},
        {"activations", activations.size()}};
    for (const auto &[name, size] : lists) {
        PREQUANT_CHECK(size == count, count, " codes go with as many ", name, ", not ", size);
    }
    const auto format = checked_input(op, input_format, input, input_scale, input_zero);
    std::vector<native::Linear> linears;
    bool native_takes_all = true;
    for (size_t i = 0; i < count; ++i) {
        Weight weight = checked_weight(op, formats[i], columns, codes[i], scales[i], zero_points.get(i));
        check_linear(op, input, weight, biases.get(i), std::nullopt);
        weight.outliers =
            checked_outliers(op, values.get(i), places.get(i), offsets.get(i), replace.get(i), weight.rows());
        linears.push_back({std::move(weight), biases.get(i), format, checked_activation(op, activations.get(i))});
        native_takes_all = native_takes_all && native::takes_linear(linears.back(), input);
    }
    if (native_takes_all) return native::run(op, linears, input, std::nullopt);
    std::vector<Tensor> outputs;
    for (const native::Linear &linear : linears) {
        const bool takes = native::takes_linear(linear, input);
        outputs.push_back(takes ? native::run(op, {linear}, input, std::nullopt).front()
                                : run_reference(op, linear, input, std::nullopt));
    }
    return outputs;
}

Tensor packed_embedding(const Tensor &ids, const Tensor &codes, const Tensor &scale, const OptionalTensor &zero_point,
                        const OptionalTensor &values, const OptionalTensor &places, const OptionalTensor &offsets,
                        bool replace, Text format, int64_t columns, int64_t, OptionalType dtype) {
    const char *op = "packed_embedding";
    const Weight weight = checked_weight(op, format, columns, codes, scale, zero_point);
    check_ids(op, ids);
    const auto outliers = checked_outliers(op, values, places, offsets, replace, weight.rows());
    const Tensor flat = ids.reshape(-1).to(at::kLong).contiguous();
    reference::check_range(op, flat, weight.rows());
    const Tensor taken = native::takes_rows(weight) ? native::dequantize(op, weight, flat)
                                                    : reference::dequantize_rows(weight, flat);
    if (outliers) reference::add_outliers_(op, taken, *outliers, flat);
    auto shape = ids.sizes().vec();
    shape.push_back(columns);
    return taken.reshape(shape).to(dtype.value_or(scale.scalar_type()));
}

}  // namespace

TORCH_LIBRARY(prequant, library) {
    const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
    library.def("quantize(Tensor input, Tensor scale, Tensor? zero_point, *, str format) -> Tensor", tags);
    library.def(
        "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, *, str format, int columns, "
        "ScalarType? dtype=None) -> Tensor",
        tags);
    library.def(
        "dequantize_bcq(Tensor planes, Tensor alphas, *, str format, int columns, ScalarType? dtype=None) -> Tensor",
        tags);
    library.def(
        "fake_quantize(Tensor input, Tensor scale, Tensor? zero_point, *, str format, bool clipped=True, "
        "bool scale_gradient=True) -> Tensor",
        tags);
    library.def("dynamic_scale(Tensor input, *, str format) -> Tensor", tags);
    library.def("uncalibrated(Tensor input, *, str format, str observer, str name) -> Tensor", tags);
    library.def("scale_gradient(Tensor input, *, float factor) -> Tensor", tags);
    library.def(
        "add_outliers(Tensor weight, Tensor values, Tensor columns, Tensor row_offsets, *, bool replace) -> Tensor",
        tags);
    library.def(
        "packed_linear(Tensor input, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? outlier_values, "
        "Tensor? outlier_columns, Tensor? outlier_row_offsets, bool outliers_replace, Tensor? bias, "
        "Tensor? input_scale, Tensor? input_zero_point, Tensor? residual=None, str format='', int columns=0, "
        "str input_format='', str activation='') -> Tensor",
        tags);
    library.def(
        "packed_linears(Tensor input, Tensor[] codes, Tensor[] scales, Tensor?[] zero_points, "
        "Tensor?[] outlier_values, Tensor?[] outlier_columns, Tensor?[] outlier_row_offsets, bool[] outliers_replace, "
        "Tensor?[] biases, Tensor? input_scale, Tensor? input_zero_point, str[] formats, str[] activations, "
        "int columns, str input_format='') -> Tensor[]",
        tags);
    library.def(
        "packed_embedding(Tensor ids, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? outlier_values, "
        "Tensor? outlier_columns, Tensor? outlier_row_offsets, bool outliers_replace, *, str format, int columns, "
        "int padding_idx=-1, ScalarType? dtype=None) -> Tensor",
        tags);
}

TORCH_LIBRARY_IMPL(prequant, CPU, library) {
    library.impl("quantize", quantize);
    library.impl("dequantize", dequantize);
    library.impl("dequantize_bcq", dequantize_bcq);
    library.impl("fake_quantize", fake_quantize);
    library.impl("dynamic_scale", dynamic_scale);
    library.impl("uncalibrated", uncalibrated);
    library.impl("scale_gradient", scale_gradient);
    library.impl("add_outliers", add_outliers);
    library.impl("packed_linear", packed_linear);
    library.impl("packed_linears", packed_linears);
    library.impl("packed_embedding", packed_embedding);
}

}  // namespace prequant_torch
