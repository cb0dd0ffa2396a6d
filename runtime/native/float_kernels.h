// Float arithmetic of a plan's steps (prequant_plan.h) that are no linear: what one instruction set provides.

#ifndef PREQUANT_FLOAT_KERNELS_H
#define PREQUANT_FLOAT_KERNELS_H

#include <stdint.h>

#include "prequant_plan.h"

namespace prequant {

// A tensor of up to four axes: where its first element lies, and how far apart, in elements, the next ones do.
struct Strided {
    char *data;
    const int64_t *strides;

    float *floats() const { return reinterpret_cast<float *>(data); }
    uint8_t *bytes() const { return reinterpret_cast<uint8_t *>(data); }
};

// softmax(scale q k^T + mask) v, each [batch, heads, tokens, depth] with depth contiguous. A mask is of booleans, which
// say what is seen, or of floats, which are added. A query that sees nothing gives 0. Keys and values are floats, or both
// codes, with the scales of their rows.
struct Attention {
    int64_t batch, heads, queries, keys, depth, value_depth;
    int64_t heads_per_key;  // queries' heads that share a head of keys and values
    float scale;
    enum prequant_mask mask_kind;
    bool of_codes;
    Strided query, key, value, mask, out, key_scale, value_scale;
};

struct FloatKernels {
    // out = (in - mean) / sqrt(variance + epsilon) * weight + bias over rows [first, last); weight and bias may be null.
    // `centered` false: no mean is taken away (root mean square).
    void (*normalize)(const Strided &in, const float *weight, const float *bias, float epsilon, bool centered,
                      const Strided &out, int64_t columns, int64_t first, int64_t last);
    // One row of `count` elements: out = function(a, b); `b` is null for functions of one operand.
    void (*elementwise)(enum prequant_function function, const float *a, int64_t a_step, const float *b, int64_t b_step,
                        float *out, int64_t count);
    // One row: the scale that just covers it, and the codes; a row that is not finite has a scale that is not a number.
    void (*quantize)(const float *in, int64_t step, uint8_t *codes, float *scale, int64_t count);
    void (*dequantize)(const uint8_t *codes, float scale, float *out, int64_t step, int64_t count);
    // Blocks [first, last) of `attention_blocks`; `own` is scratch of `attention_bytes`, aligned to 64.
    void (*attention)(const Attention &attention, int64_t first, int64_t last, char *own);
    int64_t (*attention_bytes)(const Attention &attention);
};

// Queries that are computed together, in an attention of so many.
constexpr int64_t kQueryBlock = 32;

int64_t attention_blocks(const Attention &attention);

// Those for the instruction set of that name, which is known to be one.
const FloatKernels &float_kernels_for(const char *isa);

extern const FloatKernels scalar_floats;
#ifdef PREQUANT_X86_64
extern const FloatKernels avx2_floats, avx512_floats;
void attention_by_tiles(const Attention &attention, int64_t first, int64_t last, char *own);
int64_t bytes_of_attention_by_tiles(const Attention &attention);
#endif

}  // namespace prequant

#endif
