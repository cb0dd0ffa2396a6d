// The C interface of libprequant_native: plain C types only, so that any language can call it and no version of Python
// or torch is built in. Nothing behind it allocates or throws. Threads are those of the libgomp in the process, as many
// as the caller says.

#ifndef PREQUANT_NATIVE_H
#define PREQUANT_NATIVE_H

#include <stdint.h>

#if defined(_WIN32)
#define PREQUANT_API __declspec(dllexport)
#else
#define PREQUANT_API __attribute__((visibility("default")))
#endif

// Raised by one with every change that would break a caller of the functions below: a signature, a layout, a meaning.
// runtime/native.py holds the number that it was written for and refuses any other.
#define PREQUANT_ABI_VERSION 6

#ifdef __cplusplus
extern "C" {
#endif

// The ABI version that the library was built with.
PREQUANT_API int32_t prequant_abi_version(void);

// The widest instruction set that this processor *and* its operating system let this process use, as a static string:
//   "scalar"      plain C++, any processor
//   "avx2"        AVX2, FMA, F16C
//   "avx512vnni"  the above and AVX-512 F, BW, DQ, VL, VNNI
//   "amx"         the above and AMX-TILE, AMX-INT8, AMX-BF16
// Each includes the ones before it. On Linux, AMX has to be asked for: the first call asks on behalf of the process.
PREQUANT_API const char *prequant_isa(void);

// What a call returns: nothing was written unless it is PREQUANT_OK.
enum prequant_status {
    PREQUANT_OK = 0,
    PREQUANT_BAD_WEIGHT = 1,    // a description that makes no sense, or outliers outside the weight
    PREQUANT_BAD_PANELS = 2,    // memory that these functions did not write, or codes and scales that don't go together
    PREQUANT_BAD_ISA = 3,       // an instruction set that this library or this processor does not have
    PREQUANT_BAD_CALL = 4,      // sizes that do not fit the weight, or linears that do not take one input
    PREQUANT_BAD_ROW = 5,       // a row that the weight does not have
    PREQUANT_SMALL_SCRATCH = 6  // less scratch than the call takes: workspace->needed says how much that is
};

// A weight in the neutral layout (runtime/formats.py), as a sum of terms:
//   W[r][k] = sum over terms of (multiple * u - zero) * scale,  zero = `subtrahend` where `zeros` is null.
typedef struct {
    int64_t rows, columns;
    int64_t group_size;    // columns that share a scale; 0: all of a row. Panels take multiples of 32, floats of 8
    int32_t bits;          // of a code
    int32_t terms;         // planes of a bcq weight, else 1
    int32_t base3;         // five ternary codes a byte
    int32_t multiple, subtrahend;
    int32_t shared_scale;  // one scale (and zero) for all rows
    int32_t outliers_replace;
    const uint8_t *codes;  // [terms][rows][bytes of a row]
    const float *scales;   // [terms][rows][groups], or [1]
    const float *zeros;    // the same shape, or null
    int64_t outliers;      // how many there are; 0: none, and the pointers may be null
    const float *outlier_values;
    const int32_t *outlier_columns, *outlier_offsets;
} prequant_weight;

// Rows of a weight as floats, outliers aside: out [count][columns]. `rows` says which; null: the first `count`. Float32
// throughout, and in the order of the formula above: to the last bit what the reference computes.
PREQUANT_API int32_t prequant_dequantize(const prequant_weight *weight, const int64_t *rows, int64_t count, float *out,
                                         int32_t threads, const char *isa);

// How floats become the nearest of `levels` levels: 2 are binary (-1 and 1 times the scale), 3 ternary (-1, 0, 1), more
// are affine (0 to levels - 1, less the zero point). Scales count by their magnitude, and those of affine formats are
// never taken to be 0.
typedef struct {
    int64_t elements;      // in rows of `columns`, the last of which may end early
    int64_t columns;
    int64_t group_size;    // columns that share a scale; 0: all of a row
    int32_t levels;
    int32_t shared_scale;  // the scales of one row are those of all
    const float *scales;   // [rows or 1][groups]
    const float *zeros;    // the same shape, or null: zero points (null: levels / 2), or what ternary elements have to
                           // exceed in order not to be 0 (null: half of the scale)
} prequant_rounding;

// Each element, rounded: contiguous, float32 throughout, and to the last bit what the reference computes.
PREQUANT_API int32_t prequant_round(const prequant_rounding *rounding, const float *input, float *out, int32_t threads,
                                    const char *isa);

// From the gradient to what prequant_round writes: those to the input, 0 where it was clipped (affine formats alone),
// and sums over the elements of each row that share a scale, [rows][groups]: what goes to the scale's magnitude, and the
// gradients of what was clipped (affine formats alone). Null for what is not wanted. The number of threads changes no
// bit of them.
PREQUANT_API int32_t prequant_round_gradients(const prequant_rounding *rounding, const float *gradient,
                                              const float *input, float *to_input, double *to_scale, double *to_zero,
                                              int32_t threads, const char *isa);

// Bytes that a weight's codes take in the kernels' layout; -1 for a description that makes no sense.
PREQUANT_API int64_t prequant_codes_bytes(const prequant_weight *weight);

// Write them to `codes`, which begins at a multiple of 64. Scales, zeros and outliers of the weight are not read.
PREQUANT_API int32_t prequant_pack_codes(const prequant_weight *weight, void *codes, int32_t threads);

// The same for its scales, zeros and outliers. `codes` is what prequant_pack_codes wrote of a weight with these codes:
// several weights may share it.
PREQUANT_API int64_t prequant_scales_bytes(const prequant_weight *weight);
PREQUANT_API int32_t prequant_pack_scales(const prequant_weight *weight, const void *codes, void *scales,
                                          int32_t threads);

// How the inputs of a linear are quantized; see prequant_linear.
enum prequant_input { PREQUANT_INPUT_FLOAT = 0, PREQUANT_INPUT_DYNAMIC = 1, PREQUANT_INPUT_STATIC = 2 };
enum prequant_type { PREQUANT_FLOAT32 = 0, PREQUANT_BFLOAT16 = 1 };

enum prequant_activation { PREQUANT_IDENTITY = 0, PREQUANT_RELU = 1, PREQUANT_GELU = 2, PREQUANT_GELU_TANH = 3 };

// A linear layer: what does not change from call to call.
typedef struct {
    const void *codes;         // what prequant_pack_codes wrote
    const void *scales;        // what prequant_pack_scales wrote
    const float *bias;         // [rows], or null
    const float *input_scale;  // PREQUANT_INPUT_STATIC: of all tokens, [1]
    float input_zero;          // PREQUANT_INPUT_STATIC: the code of 0, less half of the levels
    int32_t input_levels;      // quantized inputs: 2 to 256
    int32_t input;             // enum prequant_input
    int32_t type;              // enum prequant_type, of input, residual and output
    int32_t activation;        // enum prequant_activation
} prequant_linear;

// What a caller lends to a call. Two calls at once take one each.
typedef struct {
    void *scratch;          // at a multiple of 64; null with scratch_bytes 0
    int64_t scratch_bytes;
    int64_t needed;         // written by a call that returns PREQUANT_SMALL_SCRATCH: what it takes
    const char *isa;        // one of prequant_isa's names
    int32_t threads;        // at most so many
} prequant_workspace;

#define PREQUANT_MAX_LINEARS 16  // of a call

// outputs[i] = activation(quantized(input) @ W^T + bias) + residuals[i] for each linear i, from [tokens][columns] to
// [tokens][rows of i], contiguous. A residual, as large as its output, may be null, and so may `residuals`. The linears
// share columns and type, and what is read of the input wherever they quantize it alike.
//
// Quantized inputs are integers a in the range of input_levels around 0: `dynamic` scales each token by its largest
// magnitude (PREQUANT_INPUT_DYNAMIC), `static` all by input_scale. Sums of a * u are exact; all else is float32. A token
// that holds NaN or infinity gives NaN throughout.
PREQUANT_API int32_t prequant_run_linears(const prequant_linear *const *linears, int32_t count, const void *input,
                                          const void *const *residuals, void *const *outputs, int64_t tokens,
                                          prequant_workspace *workspace);

// The same for one.
PREQUANT_API int32_t prequant_run_linear(const prequant_linear *linear, const void *input, const void *residual,
                                         void *output, int64_t tokens, prequant_workspace *workspace);

#ifdef __cplusplus
}
#endif

#endif
