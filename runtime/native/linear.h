// A call of one or several linears on one input, in phases that a team of threads goes through together:
//
//     prepare      once, or by every thread for itself: it computes nothing and writes nothing but the LinearCall
//     read_tokens  every part, by any threads
//     (all meet)
//     multiply     every part, by any threads
//
// Linears that see the input alike (quantized the same way, with groups as large) share what is read of it; the panels
// of all linears are shared out over the threads together, so that three small linears keep them as busy as a large one.

#ifndef PREQUANT_LINEAR_H
#define PREQUANT_LINEAR_H

#include "kernels.h"

namespace prequant {

// About 3 KB, for a stack; what it points at is the caller's.
struct LinearCall {
    const Kernels *kernels;
    int64_t tokens;
    int64_t scratch_bytes;                     // that it takes
    int32_t count;
    int32_t readings;                          // different ways to see the input
    int32_t first_of[PREQUANT_MAX_LINEARS];    // the first job of each reading, which reads for all of its jobs
    int64_t panel_cost[PREQUANT_MAX_LINEARS];  // of each job, in proportion to the time that a panel takes
    Job jobs[PREQUANT_MAX_LINEARS];
};

// Bytes of scratch that `prepare` takes, aligned to 64; -1 for linears that it refuses.
int64_t scratch_bytes(const prequant_linear *const *linears, int32_t count, int64_t tokens, int32_t threads,
                      const Kernels &kernels);

// Describe outputs[i] = linears[i](input) + residuals[i]; `residuals` may be null, and any in it. `threads`: the most
// parts that `multiply` will be called for. Returns a prequant_status: PREQUANT_BAD_CALL for linears that do not take
// one input, or more than PREQUANT_MAX_LINEARS of them; PREQUANT_SMALL_SCRATCH for less than call.scratch_bytes, which
// is then set.
int32_t prepare(LinearCall &call, const prequant_linear *const *linears, int32_t count, const void *input,
                const void *const *residuals, void *const *outputs, int64_t tokens, void *scratch,
                int64_t scratch_bytes, int32_t threads, const Kernels &kernels);

// How many of `threads` the call is worth.
int32_t threads_worth(const LinearCall &call, int32_t threads);

// Whether one thread reads all tokens sooner than `threads` could meet again.
bool few_tokens(const LinearCall &call, int32_t threads);

// A part of the input becomes codes or floats.
void read_tokens(const LinearCall &call, int32_t part, int32_t parts);

// A part of the outputs, once all of the input has been read.
void multiply(const LinearCall &call, int32_t part, int32_t parts);

}  // namespace prequant

#endif
