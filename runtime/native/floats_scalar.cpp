// Float kernels for any processor.

#define PREQUANT_LANES 4

#include "float_attention.h"

namespace prequant {

extern const FloatKernels scalar_floats = {normalize, elementwise, attention};

}  // namespace prequant
