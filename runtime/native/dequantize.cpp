// prequant_dequantize: checks the call and shares its rows among threads.

#include "kernels.h"
#include "threads.h"

namespace {

using namespace prequant;

constexpr int64_t kFloatsPerThread = 1 << 16;

bool makes_sense(const prequant_weight &w) {
    return w.rows >= 0 && w.columns >= 1 && w.bits >= 1 && w.bits <= 8 && w.terms >= 1 && w.group_size >= 0 &&
           w.group_size % 8 == 0 && (!w.base3 || w.bits == 2);
}

}  // namespace

extern "C" {

PREQUANT_API int32_t prequant_dequantize(const prequant_weight *weight, const int64_t *rows, int64_t count, float *out,
                                         int32_t threads, const char *isa) {
    const Kernels *kernels = kernels_for(isa);
    if (!kernels) return PREQUANT_BAD_ISA;
    if (!makes_sense(*weight)) return PREQUANT_BAD_WEIGHT;
    if (threads < 1 || count < 0 || (!rows && count > weight->rows)) return PREQUANT_BAD_CALL;
    for (int64_t i = 0; rows && i < count; ++i) {
        if (rows[i] < 0 || rows[i] >= weight->rows) return PREQUANT_BAD_ROW;
    }
    const int64_t wanted = count * weight->columns / kFloatsPerThread;
    const auto parts = static_cast<int32_t>(wanted < 1 ? 1 : wanted < threads ? wanted : threads);
    parallel(parts, [&](int32_t part) {
        kernels->dequantize(*weight, rows, count * part / parts, count * (part + 1) / parts, out);
    });
    return PREQUANT_OK;
}

}  // extern "C"
