#include "kernels.h"

#include <cstring>

namespace prequant {

const Kernels *kernels_for(const char *isa) {
    static const Kernels *const all[] = {
        &scalar_kernels,
#ifdef PREQUANT_X86_64
        &avx2_kernels,   &avx512vnni_kernels, &amx_kernels,
#endif
    };
    for (const Kernels *kernels : all) {
        if (std::strcmp(kernels->isa, isa) == 0) return kernels;
    }
    return nullptr;
}

}  // namespace prequant
