#include "steps.h"

#include <cstring>

namespace prequant {

namespace {

// Below so many numbers a thread more costs more than it saves: about a microsecond of work.
constexpr int64_t kNumbersPerPart = 1 << 13;
constexpr int64_t kProductsPerPart = 1 << 15;

bool present(const prequant_operand &operand) { return operand.buffer >= 0; }

Strided at(const prequant_operand &operand, const PlanCall &call) {
    if (!present(operand)) return {nullptr, operand.strides};
    return {call.addresses[operand.buffer] + operand.offset, operand.strides};
}

const float *floats_at(const prequant_operand &operand, const PlanCall &call) {
    return reinterpret_cast<const float *>(at(operand, call).data);
}

int32_t limited(int64_t wanted, int32_t members) {
    return static_cast<int32_t>(wanted < 1 ? 1 : wanted < members ? wanted : members);
}

struct Range {
    int64_t first, last;

    Range(int64_t count, int32_t part, int32_t parts) : first(count * part / parts), last(count * (part + 1) / parts) {}
};

// ---- linear ---------------------------------------------------------------------------------------------------------

const prequant_linears &linears_of(const prequant_step &step) {
    return *static_cast<const prequant_linears *>(step.layer);
}

int32_t prepare_linear(const prequant_step &step, const PlanCall &call, LinearCall &out) {
    const prequant_linears &linears = linears_of(step);
    const void *residuals[PREQUANT_MOST_LINEARS] = {};
    void *outputs[PREQUANT_MOST_LINEARS];
    residuals[0] = at(step.operands[1], call).data;
    for (int64_t i = 0; i < linears.count; ++i) outputs[i] = at(step.operands[2 + i], call).data;
    return prepare(out, linears.linears, static_cast<int32_t>(linears.count), at(step.operands[0], call).data, residuals,
                   outputs, step.sizes[0], call.shared, call.shared_bytes, call.most_members, *call.kernels);
}

// ---- embedding ------------------------------------------------------------------------------------------------------

const prequant_weight &weight_of(const prequant_step &step) { return *static_cast<const prequant_weight *>(step.layer); }

void add_outliers(const prequant_weight &w, int64_t row, float *out) {
    for (int32_t i = w.outlier_offsets[row]; i < w.outlier_offsets[row + 1]; ++i) {
        float &place = out[w.outlier_columns[i]];
        place = w.outliers_replace ? w.outlier_values[i] : place + w.outlier_values[i];
    }
}

int32_t embed(const prequant_step &step, const PlanCall &call, Range ids) {
    const prequant_weight &weight = weight_of(step);
    const auto *rows = reinterpret_cast<const int64_t *>(at(step.operands[0], call).data);
    float *out = at(step.operands[1], call).floats();
    for (int64_t i = ids.first; i < ids.last; ++i) {
        if (rows[i] < 0 || rows[i] >= weight.rows) return PREQUANT_BAD_ROW;
    }
    call.kernels->dequantize(weight, rows, ids.first, ids.last, out);
    if (weight.outliers) {
        for (int64_t i = ids.first; i < ids.last; ++i) add_outliers(weight, rows[i], out + i * weight.columns);
    }
    return PREQUANT_OK;
}

// ---- element by element ---------------------------------------------------------------------------------------------

// Calls row(index of the first three axes) for every row of the last one.
template <class Row> void rows_of(const int64_t *sizes, Range rows, Row row) {
    for (int64_t i = rows.first; i < rows.last; ++i) {
        const int64_t axis[3] = {i / sizes[2] / sizes[1], i / sizes[2] % sizes[1], i % sizes[2]};
        row(axis);
    }
}

int64_t offset_of(const Strided &tensor, const int64_t *axis) {
    return axis[0] * tensor.strides[0] + axis[1] * tensor.strides[1] + axis[2] * tensor.strides[2];
}

int64_t rows_in(const prequant_step &step) { return step.sizes[0] * step.sizes[1] * step.sizes[2]; }

void map_elements(const prequant_step &step, const PlanCall &call, Range rows) {
    const Strided a = at(step.operands[0], call), b = at(step.operands[1], call), out = at(step.operands[2], call);
    const float number = static_cast<float>(step.number);
    rows_of(step.sizes, rows, [&](const int64_t *axis) {
        const float *of_b = b.data ? b.floats() + offset_of(b, axis) : &number;
        call.floats->elementwise(static_cast<enum prequant_function>(step.option), a.floats() + offset_of(a, axis),
                                 a.strides[3], of_b, b.data ? b.strides[3] : 0, out.floats() + offset_of(out, axis),
                                 step.sizes[3]);
    });
}

template <class Element> void copy_elements(const Strided &in, const Strided &out, const int64_t *axis, int64_t count) {
    const Element *from = reinterpret_cast<const Element *>(in.data) + offset_of(in, axis);
    Element *to = reinterpret_cast<Element *>(out.data) + offset_of(out, axis);
    const int64_t step = in.strides[3], out_step = out.strides[3];
    if (step == 1 && out_step == 1) {
        std::memcpy(to, from, static_cast<size_t>(count) * sizeof(Element));
    } else {
        for (int64_t i = 0; i < count; ++i) to[i * out_step] = from[i * step];
    }
}

void copy(const prequant_step &step, const PlanCall &call, Range rows) {
    const Strided in = at(step.operands[0], call), out = at(step.operands[1], call);
    rows_of(step.sizes, rows, [&](const int64_t *axis) {
        switch (step.sizes[4]) {
            case 1: return copy_elements<uint8_t>(in, out, axis, step.sizes[3]);
            case 2: return copy_elements<uint16_t>(in, out, axis, step.sizes[3]);
            case 4: return copy_elements<uint32_t>(in, out, axis, step.sizes[3]);
            case 8: return copy_elements<uint64_t>(in, out, axis, step.sizes[3]);
        }
    });
}

void normalize(const prequant_step &step, const PlanCall &call, Range rows) {
    call.floats->normalize(at(step.operands[0], call), floats_at(step.operands[2], call), floats_at(step.operands[3], call),
                           static_cast<float>(step.number), step.option != 0, at(step.operands[1], call), step.sizes[1],
                           rows.first, rows.last);
}

void quantize(const prequant_step &step, const PlanCall &call, Range rows) {
    const Strided in = at(step.operands[0], call), codes = at(step.operands[1], call), scale = at(step.operands[2], call);
    rows_of(step.sizes, rows, [&](const int64_t *axis) {
        call.floats->quantize(in.floats() + offset_of(in, axis), in.strides[3], codes.bytes() + offset_of(codes, axis),
                              scale.floats() + offset_of(scale, axis), step.sizes[3]);
    });
}

void dequantize(const prequant_step &step, const PlanCall &call, Range rows) {
    const Strided codes = at(step.operands[0], call), scale = at(step.operands[1], call), out = at(step.operands[2], call);
    rows_of(step.sizes, rows, [&](const int64_t *axis) {
        call.floats->dequantize(codes.bytes() + offset_of(codes, axis), scale.floats()[offset_of(scale, axis)],
                                out.floats() + offset_of(out, axis), out.strides[3], step.sizes[3]);
    });
}

// ---- attention ------------------------------------------------------------------------------------------------------

Attention attention_of(const prequant_step &step, const PlanCall *call) {
    Attention a{};
    a.batch = step.sizes[0];
    a.heads = step.sizes[1];
    a.queries = step.sizes[2];
    a.keys = step.sizes[3];
    a.depth = step.sizes[4];
    a.value_depth = step.sizes[5];
    a.heads_per_key = step.sizes[1] / step.sizes[6];
    a.scale = static_cast<float>(step.number);
    a.mask_kind = static_cast<enum prequant_mask>(step.option);
    a.of_codes = present(step.operands[5]);
    if (call) {
        Strided *const tensors[] = {&a.query, &a.key, &a.value, &a.mask, &a.out, &a.key_scale, &a.value_scale};
        for (int i = 0; i < 7; ++i) *tensors[i] = at(step.operands[i], *call);
    }
    return a;
}

// ---- all ------------------------------------------------------------------------------------------------------------

bool all_present(const prequant_step &step, int first, int last) {
    for (int i = first; i < last; ++i) {
        if (!present(step.operands[i])) return false;
    }
    return true;
}

bool makes_sense(const prequant_step &step) {
    for (const int64_t size : step.sizes) {
        if (size < 0) return false;
    }
    const int64_t width = step.sizes[4], key_heads = step.sizes[6];
    switch (step.kind) {
        case PREQUANT_STEP_LINEAR: {
            if (!step.layer) return false;
            const int64_t count = linears_of(step).count;
            return count >= 1 && count <= PREQUANT_MOST_LINEARS && present(step.operands[0]) &&
                   all_present(step, 2, 2 + static_cast<int>(count));
        }
        case PREQUANT_STEP_EMBEDDING: return step.layer && all_present(step, 0, 2);
        case PREQUANT_STEP_NORMALIZE: return all_present(step, 0, 2);
        case PREQUANT_STEP_ELEMENTWISE:
            return step.option >= 0 && step.option <= PREQUANT_NEGATE && present(step.operands[0]) &&
                   present(step.operands[2]);
        case PREQUANT_STEP_COPY:
            return all_present(step, 0, 2) && (width == 1 || width == 2 || width == 4 || width == 8);
        case PREQUANT_STEP_ATTENTION:
            return step.option >= PREQUANT_MASK_NONE && step.option <= PREQUANT_MASK_FLOAT && key_heads > 0 &&
                   step.sizes[1] % key_heads == 0 && all_present(step, 0, 3) && present(step.operands[4]) &&
                   present(step.operands[3]) == (step.option != PREQUANT_MASK_NONE) &&
                   present(step.operands[5]) == present(step.operands[6]);
        case PREQUANT_STEP_QUANTIZE:
        case PREQUANT_STEP_DEQUANTIZE: return all_present(step, 0, 3);
        default: return false;
    }
}

}  // namespace

int32_t scratch_of(const prequant_step &step, const Kernels &kernels, const FloatKernels &floats, int32_t members,
                   StepScratch &scratch) {
    if (!makes_sense(step)) return PREQUANT_BAD_CALL;
    if (step.kind == PREQUANT_STEP_LINEAR) {
        const prequant_linears &linears = linears_of(step);
        scratch.shared = scratch_bytes(linears.linears, static_cast<int32_t>(linears.count), step.sizes[0], members, kernels);
        return scratch.shared < 0 ? PREQUANT_BAD_PANELS : PREQUANT_OK;
    }
    if (step.kind == PREQUANT_STEP_ATTENTION) scratch.own = floats.attention_bytes(attention_of(step, nullptr));
    return PREQUANT_OK;
}

StepRun::StepRun(const prequant_step &step, const PlanCall &call) : step_(step), call_(call) {
    if (step.kind == PREQUANT_STEP_LINEAR) status_ = prepare_linear(step, call, linear_);
}

int32_t StepRun::parts(int32_t phase, int32_t members) const {
    const int64_t *sizes = step_.sizes;
    switch (step_.kind) {
        case PREQUANT_STEP_LINEAR: {
            if (status_) return 1;
            const int32_t worth = threads_worth(linear_, members);
            return phase == 0 && few_tokens(linear_, worth) ? 1 : worth;
        }
        case PREQUANT_STEP_EMBEDDING: return limited(sizes[0] * weight_of(step_).columns / kNumbersPerPart, members);
        case PREQUANT_STEP_NORMALIZE: return limited(sizes[0] * sizes[1] / kNumbersPerPart, members);
        case PREQUANT_STEP_ATTENTION: {
            const int64_t products = sizes[0] * sizes[1] * sizes[2] * sizes[3] * (sizes[4] + sizes[5]);
            return limited(products / kProductsPerPart, members);
        }
        default: return limited(rows_in(step_) * sizes[3] / kNumbersPerPart, members);
    }
}

int32_t StepRun::run(int32_t phase, int32_t part, int32_t parts) const {
    if (status_) return status_;
    switch (step_.kind) {
        case PREQUANT_STEP_LINEAR:
            if (phase == 0) {
                read_tokens(linear_, part, parts);
            } else {
                multiply(linear_, part, parts);
            }
            break;
        case PREQUANT_STEP_EMBEDDING: return embed(step_, call_, Range(step_.sizes[0], part, parts));
        case PREQUANT_STEP_NORMALIZE: normalize(step_, call_, Range(step_.sizes[0], part, parts)); break;
        case PREQUANT_STEP_ELEMENTWISE: map_elements(step_, call_, Range(rows_in(step_), part, parts)); break;
        case PREQUANT_STEP_COPY: copy(step_, call_, Range(rows_in(step_), part, parts)); break;
        case PREQUANT_STEP_QUANTIZE: quantize(step_, call_, Range(rows_in(step_), part, parts)); break;
        case PREQUANT_STEP_DEQUANTIZE: dequantize(step_, call_, Range(rows_in(step_), part, parts)); break;
        case PREQUANT_STEP_ATTENTION: {
            const Attention attention = attention_of(step_, &call_);
            const Range blocks(attention_blocks(attention), part, parts);
            call_.floats->attention(attention, blocks.first, blocks.last, call_.own);
            break;
        }
    }
    return PREQUANT_OK;
}

}  // namespace prequant
