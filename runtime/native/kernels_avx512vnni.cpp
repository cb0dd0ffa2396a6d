// The kernels for AVX-512 with VNNI.

#include "avx512.h"
#include "tokens_avx512.h"

namespace prequant {

extern const Kernels avx512vnni_kernels = {"avx512vnni", read_tokens_avx512, linear_by_panels<Avx512>, dequantize_rows,
                                           round_rows, round_gradients, no_own_bytes};

}  // namespace prequant
