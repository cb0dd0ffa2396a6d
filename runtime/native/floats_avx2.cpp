// Float kernels for AVX2 and FMA.

#include "float_attention.h"

namespace prequant {

extern const FloatKernels avx2_floats = {normalize, elementwise, quantize, dequantize, attention, attention_bytes};

}  // namespace prequant
