#include "reference.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "errors.h"

namespace prequant_torch::reference {

namespace {

constexpr int kTrits[5] = {1, 3, 9, 27, 81};

// ---- bytes and codes ------------------------------------------------------------------------------------------------

// Codes uint8 [..., columns] of packed ones.
Tensor unpack(const Tensor &packed, const Format &format, int64_t columns) {
    const Tensor bytes = packed.contiguous();
    auto shape = bytes.sizes().vec();
    shape.back() = columns;
    Tensor codes = at::empty(shape, bytes.options());
    const int64_t row_bytes = bytes.size(-1), rows = row_bytes ? bytes.numel() / row_bytes : 0;
    const int width = format.width();
    const uint8_t *row = bytes.const_data_ptr<uint8_t>();
    uint8_t *out = codes.data_ptr<uint8_t>();
    for (int64_t r = 0; r < rows; ++r, row += row_bytes, out += columns) {
        for (int64_t k = 0; k < columns; ++k) {
            if (format.base3) {
                out[k] = static_cast<uint8_t>(row[k / 5] / kTrits[k % 5] % 3);
                continue;
            }
            const int64_t byte = k * width / 8;
            const int shift = static_cast<int>(k * width % 8);
            unsigned word = row[byte];
            if (shift + width > 8) word |= static_cast<unsigned>(row[byte + 1]) << 8;
            out[k] = static_cast<uint8_t>(word >> shift & ((1u << width) - 1));
        }
    }
    return codes;
}

// The inverse, of codes as whole floats [..., columns].
Tensor pack(const char *op, const Tensor &codes, const Format &format) {
    if (codes.numel()) {
        const auto [low, high] = at::aminmax(codes);
        const double least = low.item<double>(), most = high.item<double>();
        // Written so that NaN is refused.
        PREQUANT_CHECK(least >= 0 && most < format.levels(), "codes reach from ", least, " to ", most, "; ",
                       format.text(), " has levels 0 to ", format.levels() - 1);
    }
    const Tensor levels = codes.to(at::kByte).contiguous();
    const int64_t columns = levels.size(-1), row_bytes = format.row_bytes(columns);
    auto shape = levels.sizes().vec();
    shape.back() = row_bytes;
    Tensor packed = at::zeros(shape, levels.options());
    const int64_t rows = columns ? levels.numel() / columns : 0;
    const int width = format.width();
    const uint8_t *row = levels.const_data_ptr<uint8_t>();
    uint8_t *out = packed.data_ptr<uint8_t>();
    for (int64_t r = 0; r < rows; ++r, row += columns, out += row_bytes) {
        for (int64_t k = 0; k < columns; ++k) {
            if (format.base3) {
                out[k / 5] = static_cast<uint8_t>(out[k / 5] + row[k] * kTrits[k % 5]);
                continue;
            }
            const int64_t byte = k * width / 8;
            const unsigned word = static_cast<unsigned>(row[k]) << (k * width % 8);
            out[byte] |= static_cast<uint8_t>(word);
            if (word > 0xff) out[byte + 1] |= static_cast<uint8_t>(word >> 8);
        }
    }
    return packed;
}

// ---- codes and numbers ----------------------------------------------------------------------------------------------

// Scales that broadcast against [..., columns].
Tensor per_element(const Tensor &scale, const Format &format, int64_t columns) {
    if (format.granularity == Granularity::tensor) return scale.reshape({1});
    if (format.granularity == Granularity::row) return scale;
    const int64_t repeats = std::min(format.group_size, std::max<int64_t>(columns, 1));
    return at::repeat_interleave(scale, repeats, -1).narrow(-1, 0, columns);
}

Tensor at_least_float32(const Tensor &input) {
    return input.to(c10::promoteTypes(input.scalar_type(), at::kFloat));
}

Tensor encode(const Tensor &given, const Tensor &scale, const OptionalTensor &zero_point, const Format &format) {
    const int64_t columns = given.size(-1);
    const Tensor input = at_least_float32(given);
    if (format.scheme == Scheme::affine) {
        Tensor codes = input / per_element(at::where(scale == 0, 1, scale), format, columns);
        if (zero_point) {
            codes.add_(per_element(*zero_point, format, columns));
        } else {
            codes.add_(format.implied_zero_point());
        }
        return codes.round_().clamp_(0, format.levels() - 1);
    }
    Tensor codes;
    if (format.scheme == Scheme::binary) {
        codes = (input >= 0).to(input.scalar_type());
    } else {
        const Tensor threshold = per_element(zero_point ? *zero_point : scale / 2, format, columns);
        codes = at::where(input.abs() > threshold, input.sign(), 0.0).add_(1);
    }
    return at::where(input.isnan(), input, codes);
}

// Codes as floats, turned into their values in units of the scale.
Tensor centred_(Tensor codes, const OptionalTensor &zero_point, const Format &format) {
    if (format.one_bit()) return codes.mul_(2).sub_(1);
    if (!zero_point || format.scheme == Scheme::ternary) return codes.sub_(format.implied_zero_point());
    return codes.sub_(per_element(*zero_point, format, codes.size(-1)));
}

Tensor scaled_(Tensor values, const Tensor &scale, const Format &format) {
    return values.mul_(per_element(scale, format, values.size(-1)));
}

Tensor decode(const Tensor &codes, const Tensor &scale, const OptionalTensor &zero_point, const Format &format,
              int64_t columns) {
    const Tensor numbers = unpack(codes, format, columns).to(scale.scalar_type());
    return scaled_(centred_(numbers, zero_point, format), scale, format);
}

double tiny_of(at::ScalarType type) {
    double tiny = 0;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "tiny",
                                    [&] { tiny = static_cast<double>(std::numeric_limits<scalar_t>::min()); });
    return tiny;
}

// Whole numbers of 16, 32 or 64 bits.
class Integers {
public:
    explicit Integers(const Tensor &tensor) : kept_(tensor.contiguous()), type_(kept_.scalar_type()) {
        data_ = kept_.const_data_ptr();
    }

    int64_t operator[](int64_t i) const {
        if (type_ == at::kUInt16) return static_cast<const uint16_t *>(data_)[i];
        if (type_ == at::kInt) return static_cast<const int32_t *>(data_)[i];
        return static_cast<const int64_t *>(data_)[i];
    }

private:
    Tensor kept_;
    at::ScalarType type_;
    const void *data_;
};

}  // namespace

Tensor quantize(const char *op, const Tensor &input, const Tensor &scale, const OptionalTensor &zero_point,
                const Format &format) {
    return pack(op, encode(input, scale, zero_point, format), format);
}

Tensor fake_quantize(const Tensor &input, const Tensor &given, const OptionalTensor &zero_point,
                     const Format &format) {
    const Tensor scale = positive_scale(given, format);
    const Tensor codes = encode(input, scale, zero_point, format);
    return scaled_(centred_(codes, zero_point, format), scale, format).to(input.scalar_type());
}

Tensor dynamic_scale(const char *op, const Tensor &input, const Format &format) {
    PREQUANT_CHECK(
        format.scheme == Scheme::affine && format.symmetric && format.granularity != Granularity::group,
        "dynamic scales are for symmetric affine formats per row (token) or tensor, not ", format.text());
    PREQUANT_CHECK(input.is_floating_point() && input.dim() > 0, "the input has to be of floats, with a dimension");
    const Tensor magnitude = input.abs();
    Tensor extent;
    if (format.granularity == Granularity::row) {
        extent = magnitude.amax({-1}, true);
    } else {
        extent = (input.numel() ? magnitude.amax() : at::zeros({}, input.options()))
                     .reshape(std::vector<int64_t>(static_cast<size_t>(input.dim()), 1));
    }
    const Tensor scale = at_least_float32(extent) / ((1 << (format.bits - 1)) - 1);
    return at::where(scale < tiny_of(scale.scalar_type()), 1.0, scale);
}

Tensor positive_scale(const Tensor &scale, const Format &format) {
    const Tensor magnitude = scale.abs();
    return format.scheme == Scheme::affine ? magnitude.clamp_min(tiny_of(scale.scalar_type())) : magnitude;
}

Tensor dequantize(const Weight &weight) {
    const Format &format = weight.format;
    if (format.scheme != Scheme::bcq) {
        return decode(weight.codes, weight.scale, weight.zero_point, format, weight.columns);
    }
    Tensor total = decode(weight.codes[0], weight.scale[0], std::nullopt, format, weight.columns);
    for (int64_t plane = 1; plane < weight.codes.size(0); ++plane) {
        total += decode(weight.codes[plane], weight.scale[plane], std::nullopt, format, weight.columns);
    }
    return total;
}

void add_outliers_(const char *op, const Tensor &weight, const Outliers &outliers, const OptionalTensor &rows) {
    const Integers places(outliers.columns), offsets(outliers.row_offsets);
    const Tensor values = outliers.values.to(weight.scalar_type()).contiguous();
    const int64_t *taken = rows ? rows->const_data_ptr<int64_t>() : nullptr;
    const int64_t columns = weight.size(1), row_stride = weight.stride(0), column_stride = weight.stride(1);
    const int64_t known = outliers.row_offsets.size(0) - 1;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "add_outliers", [&] {
        const scalar_t *value = values.const_data_ptr<scalar_t>();
        scalar_t *out = weight.data_ptr<scalar_t>();
        for (int64_t r = 0; r < weight.size(0); ++r, out += row_stride) {
            const int64_t row = taken ? taken[r] : r;
            PREQUANT_CHECK(0 <= row && row < known, "there are outliers of ", known, " rows, and none of row ", row);
            const int64_t begin = offsets[row], end = offsets[row + 1];
            PREQUANT_CHECK(0 <= begin && begin <= end && end <= values.numel(), "row ", row, " can't have outliers ",
                           begin, " to ", end, " of ", values.numel());
            for (int64_t i = begin; i < end; ++i) {
                const int64_t column = places[i];
                PREQUANT_CHECK(0 <= column && column < columns, "an outlier is in column ", column,
                               " of a weight with ", columns, " columns");
                scalar_t &place = out[column * column_stride];
                place = outliers.replace ? value[i] : static_cast<scalar_t>(place + value[i]);
            }
        }
    });
}

Tensor linear(const char *op, const Tensor &weight, const Tensor &given, const OptionalTensor &bias,
              const std::optional<InputFormat> &input_format, Activation activation, const OptionalTensor &residual) {
    Tensor input = given;
    if (input_format) {
        const Format &format = input_format->format;
        const Tensor scale = input_format->scale ? *input_format->scale : dynamic_scale(op, input, format);
        input = fake_quantize(input, scale, input_format->zero_point, format);
    }
    const auto type = input.scalar_type();
    const OptionalTensor added = bias ? OptionalTensor(bias->to(type)) : std::nullopt;
    Tensor output = at::linear(input, weight.to(type), added);
    switch (activation) {
        case Activation::none: break;
        case Activation::relu: output = at::relu(output); break;
        case Activation::gelu: output = at::gelu(output); break;
        case Activation::gelu_tanh: output = at::gelu(output, "tanh"); break;
    }
    return (residual ? output + *residual : output).contiguous();
}

void check_range(const char *op, const Tensor &ids, int64_t rows) {
    const int64_t *id = ids.const_data_ptr<int64_t>();
    if (!ids.numel()) return;
    const auto [low, high] = std::minmax_element(id, id + ids.numel());
    TORCH_CHECK_INDEX(*low >= 0 && *high < rows, "prequant::", op, ": embedding ids reach from ", *low, " to ", *high,
                      "; the table has rows 0 to ", rows - 1);
}

Tensor dequantize_rows(const Weight &weight, const Tensor &ids) {
    const bool shared = weight.format.granularity == Granularity::tensor;
    const auto taken = [&](const Tensor &scales) { return shared ? scales : scales.index_select(-2, ids); };
    Weight part = weight;
    part.codes = weight.codes.index_select(-2, ids);
    part.scale = taken(weight.scale);
    if (weight.zero_point) part.zero_point = taken(*weight.zero_point);
    return dequantize(part);
}

}  // namespace prequant_torch::reference
