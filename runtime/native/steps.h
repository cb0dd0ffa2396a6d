// The steps of a plan (prequant_plan.h), each as phases that a team goes through with a barrier after every one.

#ifndef PREQUANT_STEPS_H
#define PREQUANT_STEPS_H

#include "float_kernels.h"
#include "kernels.h"
#include "linear.h"
#include "prequant_plan.h"

namespace prequant {

// What the steps of one call have in common.
struct PlanCall {
    char *const *addresses;
    char *shared;      // scratch of the step that runs
    int64_t shared_bytes;
    char *own;         // scratch of each member, `own_bytes` apart
    int64_t own_bytes;
    int32_t most_members;
    const Kernels *kernels;
    const FloatKernels *floats;
};

// Scratch that a step takes: in common, and for each member.
struct StepScratch {
    int64_t shared, own;
};

// PREQUANT_BAD_CALL for a step that makes no sense.
int32_t scratch_of(const prequant_step &step, const Kernels &kernels, const FloatKernels &floats, int32_t members,
                   StepScratch &scratch);

// A step as one member of the team sees it.
class StepRun {
public:
    StepRun(const prequant_step &step, const PlanCall &call);

    int32_t phases() const { return step_.kind == PREQUANT_STEP_LINEAR ? 2 : 1; }

    // How many members a phase is worth: for a few numbers, meeting takes longer than computing.
    int32_t parts(int32_t phase, int32_t members) const;

    // One member's part of a phase; a prequant_status.
    int32_t run(int32_t phase, int32_t part, int32_t parts) const;

private:
    const prequant_step &step_;
    const PlanCall &call_;
    LinearCall linear_;
    int32_t status_ = PREQUANT_OK;
};

}  // namespace prequant

#endif
