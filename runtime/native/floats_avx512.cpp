// Float kernels for AVX-512.

#include "float_attention.h"

namespace prequant {

extern const FloatKernels avx512_floats = {normalize, elementwise, quantize, dequantize, attention, attention_bytes};

}  // namespace prequant
