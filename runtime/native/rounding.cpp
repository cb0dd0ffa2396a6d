// prequant_round and prequant_round_gradients: check the call and share its rows among threads.

#include "kernels.h"
#include "threads.h"

namespace {

using namespace prequant;

constexpr int64_t kFloatsPerThread = 1 << 15;

bool makes_sense(const prequant_rounding &r) {
    return r.elements >= 0 && r.columns >= 1 && r.group_size >= 0 && r.levels >= 2 && r.levels <= 256;
}

// work(first, last) for all rows.
template <class Work> void share_rows(const prequant_rounding &r, int32_t threads, Work work) {
    const int64_t rows = (r.elements + r.columns - 1) / r.columns, wanted = r.elements / kFloatsPerThread;
    const auto parts = static_cast<int32_t>(wanted < 1 ? 1 : wanted < threads ? wanted : threads);
    parallel(parts, [&](int32_t part) { work(rows * part / parts, rows * (part + 1) / parts); });
}

}  // namespace

extern "C" {

PREQUANT_API int32_t prequant_round(const prequant_rounding *rounding, const float *input, float *out, int32_t threads,
                                    const char *isa) {
    const Kernels *kernels = kernels_for(isa);
    if (!kernels) return PREQUANT_BAD_ISA;
    if (threads < 1 || !makes_sense(*rounding)) return PREQUANT_BAD_CALL;
    share_rows(*rounding, threads,
               [&](int64_t first, int64_t last) { kernels->round(*rounding, input, first, last, out); });
    return PREQUANT_OK;
}

PREQUANT_API int32_t prequant_round_gradients(const prequant_rounding *rounding, const float *gradient,
                                              const float *input, float *to_input, double *to_scale, double *to_zero,
                                              int32_t threads, const char *isa) {
    const Kernels *kernels = kernels_for(isa);
    if (!kernels) return PREQUANT_BAD_ISA;
    // Only affine formats clip: others pass the whole gradient on, and none to a threshold.
    const bool affine = rounding->levels > 3;
    if (threads < 1 || !makes_sense(*rounding) || (!affine && (to_input || to_zero))) return PREQUANT_BAD_CALL;
    share_rows(*rounding, threads, [&](int64_t first, int64_t last) {
        kernels->round_gradients(*rounding, gradient, input, first, last, to_input, to_scale, to_zero);
    });
    return PREQUANT_OK;
}

}  // extern "C"
