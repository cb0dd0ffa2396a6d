// prequant_run_linear: checks the call, shares its work among threads, and hands it to an instruction set's kernels.

#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace {

using namespace prequant;

constexpr int64_t kBytesPerThread = 1 << 15;  // of codes read: below, waking a thread costs more than it saves
constexpr int64_t kProductsPerThread = 1 << 20;

bool valid(const void *memory) {
    const auto *h = static_cast<const PanelsHeader *>(memory);
    return memory && reinterpret_cast<uintptr_t>(memory) % 64 == 0 &&
           std::memcmp(h->magic, kPanelsMagic, sizeof h->magic) == 0 && h->version == kPanelsVersion;
}

bool quantized(const prequant_linear &linear) { return linear.input != PREQUANT_INPUT_FLOAT; }

struct Scratch {
    int64_t codes, scales, sums, floats, columns, own, own_bytes, total;

    Scratch(const Kernels &kernels, const prequant_linear &linear, int64_t tokens, int32_t threads) {
        const Panels panels = panels_of(linear.panels);
        const PanelsHeader &h = *panels.header;
        const int64_t stride = stride_of(h);
        total = 0;
        const auto section = [this](int64_t bytes) {
            const int64_t start = total;
            total = round_up(total + bytes, 64);
            return start;
        };
        const bool integers = quantized(linear);
        codes = section(integers ? round_up(tokens, kTokenBlock) * stride : 0);  // AMX reads whole tiles of tokens
        scales = section(tokens * 4);
        sums = section(tokens * h.groups * 4);
        floats = section(integers ? 0 : round_up(tokens, kTokenBlock) * stride * kFloatBytes);
        const int64_t by_columns = h.outliers && tokens >= kFewestByColumns ? round_up(tokens, kTokenBlock) : 0;
        columns = section(by_columns * stride * (integers ? 1 : 4));
        own_bytes = round_up(kernels.own_bytes(panels, linear, tokens), 64);
        own = section(threads * own_bytes);
    }
};

int32_t threads_for(const PanelsHeader &h, int64_t tokens, int32_t threads) {
    const int64_t bytes = h.panels * h.terms * h.blocks * h.bits * kVector;
    const int64_t by_bytes = bytes / kBytesPerThread, by_products = h.rows * h.columns * tokens / kProductsPerThread;
    const int64_t wanted = by_bytes > by_products ? by_bytes : by_products;
    return static_cast<int32_t>(wanted < 1 ? 1 : wanted < threads ? wanted : threads);
}

bool fits(const prequant_linear &linear) {
    const bool integers = quantized(linear);
    if (integers && (linear.input_levels < 2 || linear.input_levels > 256)) return false;
    if (linear.input == PREQUANT_INPUT_STATIC && !linear.input_scale) return false;
    return linear.input >= PREQUANT_INPUT_FLOAT && linear.input <= PREQUANT_INPUT_STATIC &&
           (linear.type == PREQUANT_FLOAT32 || linear.type == PREQUANT_BFLOAT16) &&
           linear.activation >= PREQUANT_IDENTITY && linear.activation <= PREQUANT_GELU_TANH;
}

}  // namespace

extern "C" {

PREQUANT_API int64_t prequant_linear_scratch(const prequant_linear *linear, int64_t tokens, int32_t threads,
                                             const char *isa) {
    const Kernels *kernels = kernels_for(isa);
    if (!kernels || !valid(linear->panels) || tokens < 0 || threads < 1) return -1;
    return Scratch(*kernels, *linear, tokens, threads).total;
}

PREQUANT_API int32_t prequant_run_linear(const prequant_linear *linear, const void *input, const void *residual,
                                         void *output, int64_t tokens, void *scratch, int64_t scratch_bytes,
                                         int32_t threads, const char *isa) {
    if (!valid(linear->panels)) return PREQUANT_BAD_PANELS;
    const Kernels *kernels = kernels_for(isa);
    if (!kernels) return PREQUANT_BAD_ISA;
    if (!fits(*linear) || tokens < 0 || threads < 1) return PREQUANT_BAD_CALL;
    const Scratch places(*kernels, *linear, tokens, threads);
    if (scratch_bytes < places.total || reinterpret_cast<uintptr_t>(scratch) % 64) return PREQUANT_BAD_CALL;
    if (tokens == 0) return PREQUANT_OK;

    auto *base = static_cast<uint8_t *>(scratch);
    Job job{};
    job.linear = linear;
    job.panels = panels_of(linear->panels);
    const PanelsHeader &h = *job.panels.header;
    job.input = input;
    job.residual = residual;
    job.output = output;
    job.tokens = tokens;
    job.stride = stride_of(h);
    job.codes = reinterpret_cast<int8_t *>(base + places.codes);
    job.scales = reinterpret_cast<float *>(base + places.scales);
    job.sums = reinterpret_cast<int32_t *>(base + places.sums);
    job.float_sums = reinterpret_cast<float *>(base + places.sums);
    job.floats = reinterpret_cast<float *>(base + places.floats);
    if (h.outliers && tokens >= kFewestByColumns) {
        if (quantized(*linear)) {
            job.code_columns = reinterpret_cast<int8_t *>(base + places.columns);
        } else {
            job.float_columns = reinterpret_cast<float *>(base + places.columns);
        }
    }
    job.own = base + places.own;
    job.own_bytes = places.own_bytes;

    const int32_t used = threads_for(h, tokens, threads);
    // A few tokens are read sooner than threads could meet again.
    if (used == 1 || tokens < 4 * used) {
        kernels->read_tokens(job, 0, tokens);
    } else {
        parallel(used, [&](int32_t part) {
            kernels->read_tokens(job, tokens * part / used, tokens * (part + 1) / used);
        });
    }
    parallel(used, [&](int32_t part) {
        const int64_t pairs = (h.panels + 1) / 2;  // of panels, which stay together
        const int64_t first = pairs * part / used * 2, last = pairs * (part + 1) / used * 2;
        kernels->linear(job, first, last < h.panels ? last : h.panels, job.own + part * job.own_bytes);
    });
    return PREQUANT_OK;
}

}  // extern "C"
