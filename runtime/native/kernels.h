// What one instruction set provides, and what its kernels see. linear.cpp chooses the set and shares out the work.

#ifndef PREQUANT_KERNELS_H
#define PREQUANT_KERNELS_H

#include "panels.h"
#include "prequant_native.h"

namespace prequant {

constexpr int64_t kTokenBlock = 32;
constexpr int64_t kFewestByColumns = 8;
constexpr int64_t kFloatBytes = 6;  // of a float input: as such, or (AMX) in three bfloat16 parts

// One call, as the kernels see it. Tokens of quantized inputs are padded with 0 to `stride` bytes each.
struct Job {
    const prequant_linear *linear;
    Panels panels;
    const void *input, *residual;
    void *output;
    int64_t tokens;
    int64_t stride;       // of a token; at least the columns of all blocks, filled up with 0
    int8_t *codes;        // [tokens][stride], quantized inputs
    float *scales;        // [tokens]: what results are multiplied by; 1 for most inputs that stay float
    int32_t *sums;        // [tokens][groups]: sum of a token's codes over each group
    int32_t *offsets;     // the same times minus the panels' subtrahend: what products with codes are off by
    float *float_sums;    // sums of inputs that stay float, in the place of `sums`
    float *floats;        // [tokens][stride], inputs that stay float
    // Codes or floats once more, by columns: [blocks of kTokenBlock tokens][stride][kTokenBlock]. For outliers, which
    // read one column of all tokens; null where there are none, or too few tokens for it to pay.
    int8_t *code_columns;
    float *float_columns;
    uint8_t *own;         // scratch of each thread
    int64_t own_bytes;
};

// Tokens lie an odd number of cache lines apart: at 4096 bytes, all rows of a tile would fall into one set of the cache,
// and wait for every store at the same place of a page.
inline int64_t stride_of(const PanelsHeader &h) {
    const int64_t lines = h.blocks * kBlockColumns / 64;
    return (lines | 1) * 64;
}

struct Kernels {
    const char *isa;
    // Fill `codes`, `scales` and `sums`, or `floats`, of some tokens.
    void (*read_tokens)(const Job &job, int64_t first, int64_t last);
    // Outputs of some panels' rows for all tokens.
    void (*linear)(const Job &job, int64_t first_panel, int64_t last_panel, uint8_t *own);
    // Rows of a weight in the neutral layout as floats [last - first][columns]; `rows` null: the first ones.
    void (*dequantize)(const prequant_weight &weight, const int64_t *rows, int64_t first, int64_t last, float *out);
    // Elements of rows [first, last), rounded, and the gradients of that.
    void (*round)(const prequant_rounding &rounding, const float *input, int64_t first, int64_t last, float *out);
    void (*round_gradients)(const prequant_rounding &rounding, const float *gradient, const float *input, int64_t first,
                            int64_t last, float *to_input, double *to_scale, double *to_zero);
    // Bytes of `own` that `linear` takes.
    int64_t (*own_bytes)(const Panels &panels, const prequant_linear &linear, int64_t tokens);
};

// The kernels of that name, or null if there are none in this library.
const Kernels *kernels_for(const char *isa);

extern const Kernels scalar_kernels;
#ifdef PREQUANT_X86_64
extern const Kernels avx2_kernels, avx512vnni_kernels, amx_kernels;
#endif

}  // namespace prequant

#endif
