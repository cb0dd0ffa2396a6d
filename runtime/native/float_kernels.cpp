#include "float_kernels.h"

#include <cstring>

namespace prequant {

const FloatKernels &float_kernels_for(const char *isa) {
#ifdef PREQUANT_X86_64
    if (std::strcmp(isa, "avx2") == 0) return avx2_floats;
    if (std::strcmp(isa, "avx512vnni") == 0) return avx512_floats;
    if (std::strcmp(isa, "amx") == 0) {
        // Put together here: a unit for AMX must not run anything before the processor is known.
        static const FloatKernels amx_floats = {avx512_floats.normalize,  avx512_floats.elementwise,
                                                avx512_floats.quantize,   avx512_floats.dequantize,
                                                attention_by_tiles,       bytes_of_attention_by_tiles};
        return amx_floats;
    }
#else
    static_cast<void>(isa);
#endif
    return scalar_floats;
}

int64_t attention_blocks(const Attention &a) {
    return a.batch * a.heads * ((a.queries + kQueryBlock - 1) / kQueryBlock);
}

}  // namespace prequant
