// The C interface to plans: a graph as a flat list of steps on addresses, run by one call. Like prequant_native.h: plain
// C types, nothing allocates or throws. Sizes and strides are numbers: one plan is for one set of sizes.

#ifndef PREQUANT_PLAN_H
#define PREQUANT_PLAN_H

#include "prequant_native.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PREQUANT_AXES 4
#define PREQUANT_OPERANDS 7
#define PREQUANT_SIZES 7
#define PREQUANT_MOST_LINEARS 4

// What a step computes, from its operands and sizes; `out` is an operand like the others. Floats are float32 throughout,
// all but PREQUANT_LINEAR's and PREQUANT_EMBEDDING's rows may be strided. Codes are bytes, each the scale of its row times
// what it is above PREQUANT_CODE_ZERO; those of a row are contiguous.
enum prequant_step_kind {
    // operands: input, residual or none, outputs; sizes: tokens; layer: prequant_linears
    PREQUANT_STEP_LINEAR = 0,
    // operands: ids (int64), out; sizes: ids; layer: prequant_weight
    PREQUANT_STEP_EMBEDDING = 1,
    // operands: in, out, weight or none, bias or none; sizes: rows, columns; option: 1 if the mean is taken away;
    // number: epsilon
    PREQUANT_STEP_NORMALIZE = 2,
    // operands: a, b or none, out; sizes: four axes; option: enum prequant_function; number: b where there is no operand
    PREQUANT_STEP_ELEMENTWISE = 3,
    // operands: in, out; sizes: four axes, bytes of an element
    PREQUANT_STEP_COPY = 4,
    // operands: query, key, value, mask or none, out, and if keys and values are codes: scales of keys, scales of values;
    // sizes: batch, heads, queries, keys, depth, value depth, heads of keys; option: enum prequant_mask; number: scale
    PREQUANT_STEP_ATTENTION = 5,
    // operands: in, codes, scales; sizes: four axes; each row of the last one gets the scale that just covers it
    PREQUANT_STEP_QUANTIZE = 6,
    // operands: codes, scales, out; sizes: four axes
    PREQUANT_STEP_DEQUANTIZE = 7
};

#define PREQUANT_CODE_ZERO 128

enum prequant_function {
    PREQUANT_ADD = 0,
    PREQUANT_SUBTRACT = 1,
    PREQUANT_MULTIPLY = 2,
    PREQUANT_DIVIDE = 3,
    PREQUANT_APPLY_RELU = 4,
    PREQUANT_APPLY_GELU = 5,
    PREQUANT_APPLY_GELU_TANH = 6,
    PREQUANT_TANH = 7,
    PREQUANT_SIGMOID = 8,
    PREQUANT_SILU = 9,
    PREQUANT_NEGATE = 10
};

enum prequant_mask { PREQUANT_MASK_NONE = 0, PREQUANT_MASK_BOOL = 1, PREQUANT_MASK_FLOAT = 2 };

// Linears on one input.
typedef struct {
    int64_t count;
    const prequant_linear *linears[PREQUANT_MOST_LINEARS];
} prequant_linears;

typedef struct {
    int64_t buffer;  // which of the plan's addresses; negative: there is no such operand
    int64_t offset;  // bytes
    int64_t strides[PREQUANT_AXES];  // elements
} prequant_operand;

typedef struct {
    int64_t kind;  // enum prequant_step_kind
    int64_t option;
    double number;
    const void *layer;
    int64_t sizes[PREQUANT_SIZES];
    prequant_operand operands[PREQUANT_OPERANDS];
} prequant_step;

// Bytes of scratch that the steps take with so many threads; -1 for a step that is none, or an instruction set.
PREQUANT_API int64_t prequant_plan_scratch(const prequant_step *steps, int64_t count, int32_t threads, const char *isa);

// Run the steps in order on up to `threads` threads, which stay together from the first to the last. `scratch` begins at
// a multiple of 64. On failure `failed` is the step's number.
PREQUANT_API int32_t prequant_run_plan(const prequant_step *steps, int64_t count, char *const *addresses, void *scratch,
                                       int64_t scratch_bytes, int32_t threads, const char *isa, int64_t *failed);

#ifdef __cplusplus
}
#endif

#endif
