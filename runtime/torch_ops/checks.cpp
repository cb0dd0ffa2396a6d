#include "checks.h"

#include <vector>

#include "errors.h"

namespace prequant_torch {

namespace {

using Shape = std::vector<int64_t>;

Shape scale_shape(const Format &format, int64_t rows, int64_t columns) {
    if (format.granularity == Granularity::tensor) return {1, 1};
    if (format.scheme == Scheme::bcq) return {format.bits, rows, format.groups(columns)};
    return {rows, format.groups(columns)};
}

void check_zero_point(const char *op, const Format &format, bool given) {
    // That of a ternary format is the threshold of rounding.
    PREQUANT_CHECK(!given || !format.symmetric || format.scheme == Scheme::ternary, format.text(),
                   " is symmetric and takes no zero point");
    PREQUANT_CHECK(given || format.symmetric, format.text(), " is asymmetric and needs a zero point");
}

bool on_cpu(const OptionalTensor &tensor) { return !tensor || (tensor->defined() && tensor->is_cpu()); }

void check_on_cpu(const char *op, const Tensor &first, const OptionalTensor &second = std::nullopt,
                  const OptionalTensor &third = std::nullopt) {
    PREQUANT_CHECK(on_cpu(first) && on_cpu(second) && on_cpu(third), "all tensors have to be on the CPU");
}

}  // namespace

Weight checked_weight(const char *op, const std::string &text, int64_t columns, const Tensor &codes,
                      const Tensor &scale, const OptionalTensor &zero_point) {
    const Format format = parse(op, text);
    check_on_cpu(op, codes, scale, zero_point);
    PREQUANT_CHECK(columns > 0 && columns <= kMostColumns, "a weight of ", text, " can't have ", columns, " columns");
    const bool planes = format.scheme == Scheme::bcq;
    const int64_t rows = codes.dim() > 1 ? codes.size(-2) : 1;
    Shape wanted = {rows, format.row_bytes(columns)};
    if (planes) wanted.insert(wanted.begin(), format.bits);
    PREQUANT_CHECK(codes.sizes() == wanted, "codes of ", text, " with ", columns, " columns have a shape like ",
                   c10::IntArrayRef(wanted), ", not ", codes.sizes());
    PREQUANT_CHECK(codes.scalar_type() == at::kByte, "codes are uint8, not ", codes.scalar_type());
    const Shape wanted_scale = scale_shape(format, rows, columns);
    PREQUANT_CHECK(scale.sizes() == wanted_scale, text, ": codes ", codes.sizes(), " go with a scale ",
                   c10::IntArrayRef(wanted_scale), ", not ", scale.sizes());
    PREQUANT_CHECK(scale.is_floating_point(), "scales are floats, not ", scale.scalar_type());
    if (zero_point) {
        PREQUANT_CHECK(zero_point->sizes() == scale.sizes(), "a zero point has the shape of the scale, ", scale.sizes(),
                       ", not ", zero_point->sizes());
        PREQUANT_CHECK(zero_point->is_floating_point(), "zero points are floats, not ", zero_point->scalar_type());
    }
    check_zero_point(op, format, zero_point.has_value());
    return {format, codes, scale, zero_point, std::nullopt, columns};
}

std::optional<Outliers> checked_outliers(const char *op, const OptionalTensor &values, const OptionalTensor &columns,
                                         const OptionalTensor &row_offsets, bool replace, int64_t rows) {
    if (!values) return std::nullopt;
    PREQUANT_CHECK(columns && row_offsets, "outlier values come with their columns and row offsets");
    check_on_cpu(op, *values, columns, row_offsets);
    PREQUANT_CHECK(values->dim() == 1 && values->sizes() == columns->sizes(), "outlier values ", values->sizes(),
                   " and columns ", columns->sizes(), " must be vectors of one length");
    PREQUANT_CHECK(values->is_floating_point(), "outlier values are floats, not ", values->scalar_type());
    PREQUANT_CHECK(row_offsets->dim() == 1 && row_offsets->size(0) == rows + 1, "row offsets of ", rows,
                   " rows have shape [", rows + 1, "], not ", row_offsets->sizes());
    const auto places = columns->scalar_type(), offsets = row_offsets->scalar_type();
    PREQUANT_CHECK((places == at::kUInt16 || places == at::kInt) && (offsets == at::kInt || offsets == at::kLong),
                   "outliers have uint16 or int32 columns and int32 row offsets, not ", places, " and ", offsets);
    return Outliers{*values, *columns, *row_offsets, replace};
}

Format checked_rounding(const char *op, const std::string &text, const Tensor &input, const Tensor &scale,
                        const OptionalTensor &zero_point) {
    const Format format = parse(op, text);
    check_on_cpu(op, input, scale, zero_point);
    PREQUANT_CHECK(format.scheme != Scheme::bcq, "bcq codes come from a solver, not from rounding");
    PREQUANT_CHECK(input.dim() > 0, "the input needs at least one dimension");
    PREQUANT_CHECK(input.is_floating_point(), "the input has to be of floats, not ", input.scalar_type());
    PREQUANT_CHECK(input.size(-1) <= kMostColumns, "the input has ", input.size(-1), " columns, which is too many");
    Shape wanted = input.sizes().vec();
    wanted.back() = format.groups(input.size(-1));
    const auto check = [&](const char *name, const Tensor &tensor) {
        const auto shape = tensor.sizes();
        bool fits = tensor.is_floating_point();
        if (format.granularity == Granularity::tensor) {
            for (const int64_t size : shape) fits = fits && size == 1;
        } else {
            // Leading dimensions may be shared: one scale for all tokens.
            fits = fits && shape.size() == wanted.size() && shape.back() == wanted.back();
            for (size_t i = 0; fits && i + 1 < shape.size(); ++i) fits = shape[i] == 1 || shape[i] == wanted[i];
        }
        PREQUANT_CHECK(fits, text, ": an input ", input.sizes(), " goes with a ", name, " of floats ",
                       c10::IntArrayRef(wanted), ", not ", tensor.sizes(), " of ", tensor.scalar_type());
    };
    check("scale", scale);
    if (zero_point) check("zero point", *zero_point);
    check_zero_point(op, format, zero_point.has_value());
    return format;
}

std::optional<InputFormat> checked_input(const char *op, const std::string &text, const Tensor &input,
                                         const OptionalTensor &scale, const OptionalTensor &zero_point) {
    if (text.empty()) {
        PREQUANT_CHECK(!scale && !zero_point, "an input scale or zero point needs an input format");
        return std::nullopt;
    }
    if (scale) return InputFormat{checked_rounding(op, text, input, *scale, zero_point), scale, zero_point};
    PREQUANT_CHECK(!zero_point, "an input zero point needs an input scale; dynamic scales are symmetric");
    return InputFormat{parse(op, text), std::nullopt, std::nullopt};
}

void check_linear(const char *op, const Tensor &input, const Weight &weight, const OptionalTensor &bias,
                  const OptionalTensor &residual) {
    check_on_cpu(op, input, bias, residual);
    PREQUANT_CHECK(input.dim() > 0 && input.size(-1) == weight.columns, "an input ", input.sizes(),
                   " does not fit a weight with ", weight.columns, " columns");
    PREQUANT_CHECK(input.is_floating_point(), "the input of a matmul is of floats, not ", input.scalar_type());
    const int64_t rows = weight.rows();
    PREQUANT_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == rows && bias->is_floating_point()), "a bias ",
                   bias ? bias->sizes() : c10::IntArrayRef(), " does not fit a weight with ", rows, " rows");
    if (!residual) return;
    Shape wanted = input.sizes().vec();
    wanted.back() = rows;
    PREQUANT_CHECK(residual->sizes() == wanted && residual->scalar_type() == input.scalar_type(), "a residual ",
                   residual->sizes(), " of ", residual->scalar_type(), " does not fit a result ",
                   c10::IntArrayRef(wanted), " of ", input.scalar_type());
}

Activation checked_activation(const char *op, const std::string &name) {
    if (name.empty()) return Activation::none;
    if (name == "relu") return Activation::relu;
    if (name == "gelu") return Activation::gelu;
    PREQUANT_CHECK(name == "gelu_tanh", "activation '", name, "' is none of '', 'relu', 'gelu', 'gelu_tanh'");
    return Activation::gelu_tanh;
}

void check_ids(const char *op, const Tensor &ids) {
    check_on_cpu(op, ids);
    PREQUANT_CHECK(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt,
                   "embedding ids are int64 or int32, not ", ids.scalar_type());
}

}  // namespace prequant_torch
