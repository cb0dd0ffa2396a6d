#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "errors.h"
#include "memory.h"
#include "native.h"
#include "panels.h"
#include "reference.h"

namespace prequant_torch::native {

namespace {

constexpr int64_t kMostPanelColumns = 1 << 16;
constexpr int64_t kPanelGroupMultiple = 32;  // groups that kernels take are multiples of so many columns

// What a thread lends to its calls, so that no call allocates what the last one had already.
class Workspace {
public:
    prequant_workspace *get() {
        lent_.threads = at::get_num_threads();
        lent_.isa = isa().c_str();
        return &lent_;
    }

    void grow() {
        scratch_ = aligned_bytes(lent_.needed);
        lent_.scratch = scratch_.get();
        lent_.scratch_bytes = lent_.needed;
    }

private:
    std::shared_ptr<void> scratch_;
    prequant_workspace lent_{};
};

// A linear as the library describes it, with what its addresses point at.
struct Layer {
    Panels panels;
    OptionalTensor bias;
    float input_scale = 0;
    prequant_linear linear{};

    Layer(const char *op, const Linear &given, at::ScalarType type) : panels(panels_of(op, given.weight)) {
        if (given.bias) bias = given.bias->to(at::kFloat).contiguous();
        linear.codes = panels.codes.get();
        linear.scales = panels.scales.get();
        linear.bias = bias ? bias->const_data_ptr<float>() : nullptr;
        linear.type = type == at::kFloat ? PREQUANT_FLOAT32 : PREQUANT_BFLOAT16;
        switch (given.activation) {
            case Activation::none: linear.activation = PREQUANT_IDENTITY; break;
            case Activation::relu: linear.activation = PREQUANT_RELU; break;
            case Activation::gelu: linear.activation = PREQUANT_GELU; break;
            case Activation::gelu_tanh: linear.activation = PREQUANT_GELU_TANH; break;
        }
        if (!given.input_format) return;
        const InputFormat &input = *given.input_format;
        const int levels = input.format.levels();
        linear.input_levels = levels;
        linear.input = input.scale ? PREQUANT_INPUT_STATIC : PREQUANT_INPUT_DYNAMIC;
        if (input.scale) input_scale = reference::positive_scale(*input.scale, input.format).item<float>();
        if (input.zero_point) linear.input_zero = input.zero_point->item<float>() - static_cast<float>(levels / 2);
    }

    const prequant_linear *get() {
        if (linear.input == PREQUANT_INPUT_STATIC) linear.input_scale = &input_scale;  // where this is by now
        return &linear;
    }
};

bool takes_input(const InputFormat &input) {
    const Format &format = input.format;
    if (format.scheme != Scheme::affine || format.granularity == Granularity::group) return false;
    if (!input.scale) return format.granularity == Granularity::row && format.symmetric;
    return input.scale->numel() == 1 && (!input.zero_point || input.zero_point->numel() == 1);
}

}  // namespace

bool takes_linear(const Linear &linear, const Tensor &input) {
    const auto type = input.scalar_type();
    const Weight &weight = linear.weight;
    return on() && (type == at::kFloat || type == at::kBFloat16) && weight.columns <= kMostPanelColumns &&
           weight.format.group_size % kPanelGroupMultiple == 0 && weight.scale.scalar_type() == at::kFloat &&
           (!linear.input_format || takes_input(*linear.input_format));
}

std::vector<Tensor> run(const char *op, const std::vector<Linear> &linears, const Tensor &given,
                        const OptionalTensor &residual) {
    const Tensor input = given.contiguous();
    const int64_t tokens = input.numel() / linears.front().weight.columns;
    const Tensor added = residual ? residual->contiguous() : Tensor();
    std::vector<Layer> layers;
    std::vector<Tensor> outputs;
    layers.reserve(linears.size());
    for (const Linear &linear : linears) {
        layers.emplace_back(op, linear, input.scalar_type());
        auto shape = input.sizes().vec();
        shape.back() = linear.weight.rows();
        outputs.push_back(at::empty(shape, input.options()));
    }
    std::vector<const prequant_linear *> addresses;
    std::vector<void *> places;
    for (size_t i = 0; i < layers.size(); ++i) {
        addresses.push_back(layers[i].get());
        places.push_back(outputs[i].mutable_data_ptr());
    }
    const void *const residuals[] = {residual ? added.const_data_ptr() : nullptr};  // which goes with one linear
    static thread_local Workspace workspace;
    for (size_t first = 0; first < layers.size(); first += PREQUANT_MAX_LINEARS) {
        const size_t count = std::min<size_t>(layers.size() - first, PREQUANT_MAX_LINEARS);
        const auto call = [&] {
            return prequant_run_linears(&addresses[first], static_cast<int32_t>(count), input.const_data_ptr(),
                                        residual ? residuals : nullptr, &places[first], tokens, workspace.get());
        };
        int32_t status = call();
        if (status == PREQUANT_SMALL_SCRATCH) {
            workspace.grow();
            status = call();
        }
        check(op, status, linears[first].weight);
    }
    return outputs;
}

}  // namespace prequant_torch::native
