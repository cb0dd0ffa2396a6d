#include "float_kernels.h"

#include <cstring>

namespace prequant {

const FloatKernels &float_kernels_for(const char *isa) {
#ifdef PREQUANT_X86_64
    if (std::strcmp(isa, "avx2") == 0) return avx2_floats;
    if (std::strcmp(isa, "avx512vnni") == 0 || std::strcmp(isa, "amx") == 0) return avx512_floats;
#else
    static_cast<void>(isa);
#endif
    return scalar_floats;
}

int64_t attention_blocks(const Attention &a) {
    return a.batch * a.heads * ((a.queries + kQueryBlock - 1) / kQueryBlock);
}

int64_t attention_bytes(const Attention &a) {
    constexpr int64_t kMostPanelKeys = 64;
    const int64_t keys = (a.keys + kMostPanelKeys - 1) / kMostPanelKeys * kMostPanelKeys;
    return (keys * a.depth + keys * kQueryBlock) * static_cast<int64_t>(sizeof(float));
}

}  // namespace prequant
