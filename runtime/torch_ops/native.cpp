#include "native.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstdlib>
#include <iterator>

#include "errors.h"

namespace prequant_torch::native {

namespace {

constexpr int64_t kGroupMultiple = 8;  // groups that the library makes floats of are multiples of so many columns
constexpr int64_t kSharedRun = 4096;   // so many elements of those that all share one scale are a row to the library

std::string chosen_isa() {
    TORCH_CHECK(prequant_abi_version() == PREQUANT_ABI_VERSION, "libprequant_native.so has ABI version ",
                prequant_abi_version(), ", but libprequant_torch_ops was built for ", PREQUANT_ABI_VERSION,
                ": build it again");
    const char *set = std::getenv("PREQUANT_ISA");
    const std::string wanted = set ? set : "", widest = prequant_isa();
    if (wanted.empty()) return widest;
    // Each includes the ones before it.
    const std::vector<std::string> known = {"reference", "scalar", "avx2", "avx512vnni", "amx"};
    bool had = false, seen_widest = false;
    for (const std::string &name : known) {
        had = had || (name == wanted && !seen_widest);
        seen_widest = seen_widest || name == widest;
    }
    TORCH_CHECK(had, "PREQUANT_ISA=", wanted, ": expected reference, or one of scalar, avx2, avx512vnni, amx that is ",
                "no wider than this processor's ", widest);
    return wanted;
}

OptionalTensor floats(const OptionalTensor &tensor) {
    return tensor ? OptionalTensor(tensor->to(at::kFloat).contiguous()) : std::nullopt;
}

template <class T> const T *address(const OptionalTensor &tensor) {
    return tensor ? static_cast<const T *>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace

const std::string &isa() {
    static const std::string chosen = chosen_isa();
    return chosen;
}

bool on() { return isa() != "reference"; }

void check(const char *op, int32_t status, const Weight &weight) {
    static const char *const meanings[] = {
        "", "a weight that makes no sense", "codes or scales that were not packed by it, or not for each other",
        "an instruction set that it does not have", "sizes that do not fit", "a row that the weight does not have",
        "too little scratch"};
    const bool named = status > 0 && status < static_cast<int32_t>(std::size(meanings));
    PREQUANT_CHECK(status == PREQUANT_OK, "the native library was given ",
                   named ? meanings[status] : "what it has no name for", " (status ", status, "): a weight ",
                   weight.codes.sizes(), " of ", weight.format.text());
}

NeutralWeight::NeutralWeight(const Weight &weight)
    : codes_(weight.codes.contiguous()), scales_(floats(weight.scale)), weight_{} {
    const Format &format = weight.format;
    // A ternary one is the threshold of rounding, which codes have behind them.
    if (format.scheme != Scheme::ternary) zeros_ = floats(weight.zero_point);
    weight_.rows = weight.rows();
    weight_.columns = weight.columns;
    weight_.group_size = format.group_size;
    weight_.bits = format.width();
    weight_.terms = format.scheme == Scheme::bcq ? format.bits : 1;
    weight_.base3 = format.base3;
    weight_.multiple = format.one_bit() ? 2 : 1;
    weight_.subtrahend = format.one_bit() ? 1 : format.implied_zero_point();
    weight_.shared_scale = format.granularity == Granularity::tensor;
    weight_.codes = codes_.const_data_ptr<uint8_t>();
    weight_.scales = address<float>(scales_);
    weight_.zeros = address<float>(zeros_);
    if (!weight.outliers) return;
    values_ = floats(weight.outliers->values);
    places_ = weight.outliers->columns.to(at::kInt).contiguous();
    offsets_ = weight.outliers->row_offsets.to(at::kInt).contiguous();
    weight_.outliers_replace = weight.outliers->replace;
    weight_.outliers = values_->numel();
    weight_.outlier_values = address<float>(values_);
    weight_.outlier_columns = address<int32_t>(places_);
    weight_.outlier_offsets = address<int32_t>(offsets_);
}

bool takes_rows(const Weight &weight) {
    return on() && weight.scale.scalar_type() == at::kFloat && weight.format.group_size % kGroupMultiple == 0;
}

Tensor dequantize(const char *op, const Weight &weight, const OptionalTensor &ids) {
    Weight dense = weight;
    dense.outliers.reset();
    const NeutralWeight neutral(dense);
    const int64_t count = ids ? ids->numel() : weight.rows();
    Tensor out = at::empty({count, weight.columns}, at::kFloat);
    const int32_t status = prequant_dequantize(neutral.get(), address<int64_t>(ids), count, out.data_ptr<float>(),
                                               at::get_num_threads(), isa().c_str());
    check(op, status, weight);
    return out;
}

// ---- rounding -------------------------------------------------------------------------------------------------------

namespace {

// The same scales for all rows.
bool shared(const Format &format, const Tensor &scale) {
    return format.granularity == Granularity::tensor || scale.numel() == scale.size(-1);
}

}  // namespace

bool takes_rounding(const Format &format, const Tensor &input, const Tensor &scale, const OptionalTensor &zero_point) {
    const auto is_float = [](const Tensor &tensor) { return tensor.scalar_type() == at::kFloat; };
    if (!on() || !input.numel() || !is_float(input) || !is_float(scale)) return false;
    if (zero_point && (!is_float(*zero_point) || zero_point->sizes() != scale.sizes())) return false;
    return shared(format, scale) || scale.sizes().slice(0, scale.dim() - 1) == input.sizes().slice(0, input.dim() - 1);
}

Tensor fake_quantize(const char *op, const Tensor &input, const Tensor &scale, const OptionalTensor &zero_point,
                     const Format &format) {
    const Tensor elements = input.contiguous();
    const OptionalTensor scales = floats(scale), zeros = floats(zero_point);
    const bool one = scale.numel() == 1;
    prequant_rounding rounding{};
    rounding.elements = elements.numel();
    rounding.columns = one ? kSharedRun : input.size(-1);
    rounding.group_size = one ? 0 : format.group_size;
    rounding.levels = format.levels();
    rounding.shared_scale = shared(format, scale);
    rounding.scales = address<float>(scales);
    rounding.zeros = address<float>(zeros);
    Tensor out = at::empty_like(elements);
    const int32_t status = prequant_round(&rounding, elements.const_data_ptr<float>(), out.data_ptr<float>(),
                                          at::get_num_threads(), isa().c_str());
    PREQUANT_CHECK(status == PREQUANT_OK, "the native library can't round ", input.sizes(), " to ", format.text(),
                   " (status ", status, ")");
    return input.is_contiguous() ? out : at::empty_like(input).copy_(out);
}

}  // namespace prequant_torch::native
