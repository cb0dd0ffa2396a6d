// prequant_run_plan: one team of threads for all steps.

#include "prequant_plan.h"

#include <atomic>

#include "steps.h"
#include "team.h"

namespace {

using namespace prequant;

// The most that any step takes.
int32_t most_scratch(const prequant_step *steps, int64_t count, const Kernels &kernels, const FloatKernels &floats,
                     int32_t members, StepScratch &most, int64_t *failed) {
    most = {0, 0};
    for (int64_t i = 0; i < count; ++i) {
        StepScratch scratch{0, 0};
        if (const int32_t status = scratch_of(steps[i], kernels, floats, members, scratch)) {
            if (failed) *failed = i;
            return status;
        }
        if (scratch.shared > most.shared) most.shared = scratch.shared;
        if (scratch.own > most.own) most.own = scratch.own;
    }
    most.shared = round_up(most.shared, 64);
    most.own = round_up(most.own, 64);
    return PREQUANT_OK;
}

struct Run {
    const prequant_step *steps;
    int64_t count;
    PlanCall call;
    Barrier barrier{};
    std::atomic<int32_t> status{PREQUANT_OK};
    int64_t failed = -1;

    void steps_of(int32_t member, int32_t members) {
        PlanCall mine = call;
        mine.own += member * call.own_bytes;
        bool together = false;  // whether more than the first member has worked since they last met
        for (int64_t i = 0; i < count; ++i) {
            const StepRun step(steps[i], mine);
            for (int32_t phase = 0; phase < step.phases(); ++phase) {
                const int32_t parts = step.parts(phase, members);
                // What one member does after another thing that it did needs no meeting.
                if (i + phase > 0 && (together || parts > 1)) barrier.wait(members);
                together = parts > 1;
                // After a failure nothing computes, so that what failed is still there to be looked at.
                if (member >= parts || status.load(std::memory_order_relaxed)) continue;
                if (const int32_t found = step.run(phase, member, parts)) report(i, found);
            }
        }
    }

    // The first failure that is reported stands.
    void report(int64_t step, int32_t found) {
        int32_t none = PREQUANT_OK;
        if (status.compare_exchange_strong(none, found)) failed = step;
    }
};

}  // namespace

extern "C" {

PREQUANT_API int64_t prequant_plan_scratch(const prequant_step *steps, int64_t count, int32_t threads, const char *isa) {
    const Kernels *kernels = kernels_for(isa);
    if (!kernels || threads < 1) return -1;
    StepScratch most;
    if (most_scratch(steps, count, *kernels, float_kernels_for(isa), threads, most, nullptr)) return -1;
    return most.shared + threads * most.own;
}

PREQUANT_API int32_t prequant_run_plan(const prequant_step *steps, int64_t count, char *const *addresses, void *scratch,
                                       int64_t scratch_bytes, int32_t threads, const char *isa, int64_t *failed) {
    const Kernels *kernels = kernels_for(isa);
    if (!kernels) return PREQUANT_BAD_ISA;
    if (threads < 1 || reinterpret_cast<uintptr_t>(scratch) % 64) return PREQUANT_BAD_CALL;
    const FloatKernels &floats = float_kernels_for(isa);
    StepScratch most;
    if (const int32_t status = most_scratch(steps, count, *kernels, floats, threads, most, failed)) return status;
    if (most.shared + threads * most.own > scratch_bytes) return PREQUANT_BAD_CALL;

    auto *base = static_cast<char *>(scratch);
    Run run{steps, count, {addresses, base, most.shared, base + most.shared, most.own, threads, kernels, &floats}};
    with_team(threads, [&run](int32_t member, int32_t members) { run.steps_of(member, members); });
    if (run.status.load() && failed) *failed = run.failed;
    return run.status.load();
}

}  // extern "C"
