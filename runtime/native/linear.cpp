// The phases of linear.h, and prequant_run_linears, which goes through them with a team of threads.

#include "linear.h"

#include "sections.h"
#include "threads.h"

namespace {

using namespace prequant;

constexpr int64_t kBytesPerThread = 1 << 15;  // of codes read: below, waking a thread costs more than it saves
constexpr int64_t kProductsPerThread = 1 << 20;
constexpr int64_t kTogether = 2;  // panels that stay together: AMX takes pairs

bool quantized(const prequant_linear &linear) { return linear.input != PREQUANT_INPUT_FLOAT; }

bool fits(const prequant_linear &linear) {
    const bool integers = quantized(linear);
    if (integers && (linear.input_levels < 2 || linear.input_levels > 256)) return false;
    if (linear.input == PREQUANT_INPUT_STATIC && !linear.input_scale) return false;
    return linear.input >= PREQUANT_INPUT_FLOAT && linear.input <= PREQUANT_INPUT_STATIC &&
           (linear.type == PREQUANT_FLOAT32 || linear.type == PREQUANT_BFLOAT16) &&
           linear.activation >= PREQUANT_IDENTITY && linear.activation <= PREQUANT_GELU_TANH;
}

// Whether what is read of the input for one of them serves the other as well.
bool same_reading(const Job &a, const Job &b) {
    const prequant_linear &x = *a.linear, &y = *b.linear;
    if (x.input != y.input) return false;
    if (quantized(x)) {
        if (x.input_levels != y.input_levels || a.panels.header->subtrahend != b.panels.header->subtrahend) return false;
        if (x.input == PREQUANT_INPUT_STATIC &&
            (*x.input_scale != *y.input_scale || x.input_zero != y.input_zero)) return false;
    } else if (!a.panels.zeros || !b.panels.zeros) {
        return !a.panels.zeros && !b.panels.zeros;  // no one sums floats over groups but for zero points
    }
    return a.panels.header->group_blocks == b.panels.header->group_blocks;
}

// Roughly, as measured with AVX-512 and AMX: codes cost their bits once, and each token its products.
int64_t cost_of_panel(const PanelsHeader &h, int64_t tokens) {
    return h.terms * h.blocks * (8 * h.bits + 4 + tokens);
}

// Everything of a call but its input and outputs. Leaves `sections` behind the scratch that it takes.
int32_t lay_out(LinearCall &call, const prequant_linear *const *linears, int32_t count, int64_t tokens,
                int32_t threads, const Kernels &kernels, Sections &sections) {
    if (count < 1 || count > PREQUANT_MAX_LINEARS || tokens < 0 || threads < 1) return PREQUANT_BAD_CALL;
    call.kernels = &kernels;
    call.tokens = tokens;
    call.count = count;
    call.readings = 0;
    int32_t reading_of[PREQUANT_MAX_LINEARS];
    bool by_columns[PREQUANT_MAX_LINEARS];
    int64_t own_bytes = 0;
    for (int32_t i = 0; i < count; ++i) {
        if (!valid_panels(linears[i]->codes, linears[i]->scales)) return PREQUANT_BAD_PANELS;
        if (!fits(*linears[i])) return PREQUANT_BAD_CALL;
        Job &job = call.jobs[i];
        job = Job{};
        job.linear = linears[i];
        job.panels = panels_of(linears[i]->codes, linears[i]->scales);
        const PanelsHeader &h = *job.panels.header;
        if (h.columns != call.jobs[0].panels.header->columns || job.linear->type != linears[0]->type) {
            return PREQUANT_BAD_CALL;
        }
        job.tokens = tokens;
        job.stride = stride_of(h);
        call.panel_cost[i] = cost_of_panel(h, tokens);
        const int64_t own = round_up(kernels.own_bytes(job.panels, *job.linear, tokens), 64);
        own_bytes = own > own_bytes ? own : own_bytes;
        int32_t reading = 0;
        while (reading < call.readings && !same_reading(call.jobs[call.first_of[reading]], job)) ++reading;
        if (reading == call.readings) {
            call.first_of[call.readings++] = i;
            by_columns[reading] = false;
        }
        reading_of[i] = reading;
        by_columns[reading] |= h.outliers && tokens >= kFewestByColumns;
    }
    for (int32_t i = 0; i < call.readings; ++i) {
        Job &job = call.jobs[call.first_of[i]];
        const int64_t padded = round_up(tokens, kTokenBlock);  // AMX reads whole tiles of tokens
        const int64_t sums = tokens * job.panels.header->groups;
        job.scales = sections.take<float>(tokens * 4);
        if (quantized(*job.linear)) {
            job.codes = sections.take<int8_t>(padded * job.stride);
            job.sums = sections.take<int32_t>(sums * 4);
            job.offsets = sections.take<int32_t>(sums * 4);
            if (by_columns[i]) job.code_columns = sections.take<int8_t>(padded * job.stride);
        } else {
            job.floats = sections.take<float>(padded * job.stride * kFloatBytes);
            if (job.panels.zeros) job.float_sums = sections.take<float>(sums * 4);
            if (by_columns[i]) job.float_columns = sections.take<float>(padded * job.stride * 4);
        }
    }
    auto *own = sections.take<uint8_t>(threads * own_bytes);
    for (int32_t i = 0; i < count; ++i) {
        Job &job = call.jobs[i];
        const Job &reader = call.jobs[call.first_of[reading_of[i]]];
        job.codes = reader.codes;
        job.scales = reader.scales;
        job.sums = reader.sums;
        job.offsets = reader.offsets;
        job.code_columns = reader.code_columns;
        job.floats = reader.floats;
        job.float_sums = reader.float_sums;
        job.float_columns = reader.float_columns;
        job.own = own;
        job.own_bytes = own_bytes;
    }
    return PREQUANT_OK;
}

int64_t units_of(const Job &job) { return (job.panels.header->panels + kTogether - 1) / kTogether; }

}  // namespace

namespace prequant {

int64_t scratch_bytes(const prequant_linear *const *linears, int32_t count, int64_t tokens, int32_t threads,
                      const Kernels &kernels) {
    LinearCall call;
    Sections sections{0};
    if (lay_out(call, linears, count, tokens, threads, kernels, sections)) return -1;
    return static_cast<int64_t>(sections.next);
}

int32_t prepare(LinearCall &call, const prequant_linear *const *linears, int32_t count, const void *input,
                const void *const *residuals, void *const *outputs, int64_t tokens, void *scratch,
                int64_t scratch_bytes, int32_t threads, const Kernels &kernels) {
    const auto start = reinterpret_cast<uintptr_t>(scratch);
    Sections sections{start};
    const int32_t status = lay_out(call, linears, count, tokens, threads, kernels, sections);
    if (status) return status;
    if (start % 64 || scratch_bytes < 0) return PREQUANT_BAD_CALL;
    call.scratch_bytes = static_cast<int64_t>(sections.next - start);
    if (scratch_bytes < call.scratch_bytes) return PREQUANT_SMALL_SCRATCH;
    for (int32_t i = 0; i < count; ++i) {
        call.jobs[i].input = input;
        call.jobs[i].residual = residuals ? residuals[i] : nullptr;
        call.jobs[i].output = outputs[i];
    }
    return PREQUANT_OK;
}

int32_t threads_worth(const LinearCall &call, int32_t threads) {
    int64_t bytes = 0, products = 0;
    for (int32_t i = 0; i < call.count; ++i) {
        const PanelsHeader &h = *call.jobs[i].panels.header;
        bytes += h.panels * h.terms * h.blocks * h.bits * kVector;
        products += h.rows * h.columns * call.tokens;
    }
    const int64_t by_bytes = bytes / kBytesPerThread, by_products = products / kProductsPerThread;
    const int64_t wanted = by_bytes > by_products ? by_bytes : by_products;
    return static_cast<int32_t>(wanted < 1 ? 1 : wanted < threads ? wanted : threads);
}

bool few_tokens(const LinearCall &call, int32_t threads) { return threads == 1 || call.tokens < 4 * threads; }

void read_tokens(const LinearCall &call, int32_t part, int32_t parts) {
    const int64_t first = call.tokens * part / parts, last = call.tokens * (part + 1) / parts;
    for (int32_t i = 0; i < call.readings; ++i) call.kernels->read_tokens(call.jobs[call.first_of[i]], first, last);
}

void multiply(const LinearCall &call, int32_t part, int32_t parts) {
    if (call.tokens == 0) return;
    int64_t total = 0;
    for (int32_t i = 0; i < call.count; ++i) total += units_of(call.jobs[i]) * call.panel_cost[i];
    const int64_t begin = total * part / parts, end = total * (part + 1) / parts;
    int64_t before = 0;  // the cost of the jobs before this one
    for (int32_t i = 0; i < call.count; ++i) {
        const Job &job = call.jobs[i];
        const int64_t units = units_of(job), cost = call.panel_cost[i], panels = job.panels.header->panels;
        // Where the part's bounds fall in this job, to the nearest unit. Neighbouring parts round the same number.
        const auto place = [&](int64_t bound) {
            const int64_t unit = (bound - before + cost / 2) / cost;
            return (bound <= before ? 0 : unit < units ? unit : units) * kTogether;
        };
        const int64_t first = place(begin), last = place(end);
        if (first < last) {
            call.kernels->linear(job, first, last < panels ? last : panels, job.own + part * job.own_bytes);
        }
        before += units * cost;
    }
}

}  // namespace prequant

extern "C" {

PREQUANT_API int32_t prequant_run_linears(const prequant_linear *const *linears, int32_t count, const void *input,
                                          const void *const *residuals, void *const *outputs, int64_t tokens,
                                          prequant_workspace *workspace) {
    const Kernels *kernels = kernels_for(workspace->isa);
    if (!kernels) return PREQUANT_BAD_ISA;
    LinearCall call;
    const int32_t status = prepare(call, linears, count, input, residuals, outputs, tokens, workspace->scratch,
                                   workspace->scratch_bytes, workspace->threads, *kernels);
    if (status == PREQUANT_SMALL_SCRATCH) workspace->needed = call.scratch_bytes;
    if (status) return status;
    const int32_t used = threads_worth(call, workspace->threads);
    if (few_tokens(call, used)) {
        read_tokens(call, 0, 1);
    } else {
        parallel(used, [&](int32_t part) { read_tokens(call, part, used); });
    }
    parallel(used, [&](int32_t part) { multiply(call, part, used); });
    return PREQUANT_OK;
}

PREQUANT_API int32_t prequant_run_linear(const prequant_linear *linear, const void *input, const void *residual,
                                         void *output, int64_t tokens, prequant_workspace *workspace) {
    return prequant_run_linears(&linear, 1, input, &residual, &output, tokens, workspace);
}

}  // extern "C"
