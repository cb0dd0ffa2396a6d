// Float kernels for AVX-512.

#define PREQUANT_LANES 16

#include "float_attention.h"

namespace prequant {

extern const FloatKernels avx512_floats = {normalize, elementwise, attention};

}  // namespace prequant
