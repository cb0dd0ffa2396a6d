// Calls of the native library (native/prequant_native.h), and which calls of the operators it takes: what
// runtime/native_*.py are to Python.

#ifndef PREQUANT_TORCH_NATIVE_H
#define PREQUANT_TORCH_NATIVE_H

#include <vector>

#include "checks.h"
#include "prequant_native.h"

namespace prequant_torch::native {

// The instruction set that kernels use: that of the environment variable PREQUANT_ISA if it is set, else the widest of
// this processor. Throws for one that it does not have, and for a library of another version than the header.
const std::string &isa();

// Whether there are native kernels in this process: PREQUANT_ISA may say "reference".
bool on();

// Throws c10::Error unless `status`, a result of the library, is PREQUANT_OK.
void check(const char *op, int32_t status, const Weight &weight);

// A weight as the library describes it. It holds bare addresses, and the tensors that these lie in.
class NeutralWeight {
public:
    explicit NeutralWeight(const Weight &weight);
    const prequant_weight *get() const { return &weight_; }

private:
    Tensor codes_;
    OptionalTensor scales_, zeros_, values_, places_, offsets_;
    prequant_weight weight_;
};

// ---- rows as floats (native_rows.py) --------------------------------------------------------------------------------

bool takes_rows(const Weight &weight);

// Rows `ids`, int64 [count], or all: float32 [count, columns], outliers aside.
Tensor dequantize(const char *op, const Weight &weight, const OptionalTensor &ids);

// ---- rounding (native_rounding.py) ----------------------------------------------------------------------------------

bool takes_rounding(const Format &format, const Tensor &input, const Tensor &scale, const OptionalTensor &zero_point);

Tensor fake_quantize(const char *op, const Tensor &input, const Tensor &scale, const OptionalTensor &zero_point,
                     const Format &format);

// ---- linears (native_linear.py) -------------------------------------------------------------------------------------

struct Linear {
    Weight weight;
    OptionalTensor bias;
    std::optional<InputFormat> input_format;
    Activation activation;
};

bool takes_linear(const Linear &linear, const Tensor &input);

// What the linears, all of which take the input, make of it; weights are packed when they are new, or were written to.
std::vector<Tensor> run(const char *op, const std::vector<Linear> &linears, const Tensor &input,
                        const OptionalTensor &residual);

}  // namespace prequant_torch::native

#endif
