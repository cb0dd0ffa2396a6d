// Float kernels for AVX2 and FMA.

#define PREQUANT_LANES 8

#include "float_attention.h"

namespace prequant {

extern const FloatKernels avx2_floats = {normalize, elementwise, attention};

}  // namespace prequant
