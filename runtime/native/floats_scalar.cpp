// Float kernels for any processor.

#include "float_attention.h"

namespace prequant {

extern const FloatKernels scalar_floats = {normalize, elementwise, quantize, dequantize, attention, attention_bytes};

}  // namespace prequant
