// Runs the steps of plans on every instruction set with random sizes and strides, on buffers of exactly their size,
// against sums in double: built with sanitizers, it finds what reads or writes beyond them.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include <omp.h>

#include "prequant_plan.h"

namespace {

std::mt19937 randoms(1);

int64_t between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(randoms); }

// A tensor of up to four axes in memory of its own, with gaps that only the last element lacks.
struct Operand {
    std::vector<int64_t> sizes, strides;
    void *memory = nullptr;
    int64_t length = 1;

    Operand(std::vector<int64_t> given, bool contiguous_last, size_t bytes)
        : sizes(std::move(given)), strides(sizes.size()) {
        int64_t next = contiguous_last ? 1 : between(1, 3);
        for (size_t axis = sizes.size(); axis-- > 0;) {
            strides[axis] = next;
            next = (next * sizes[axis] > 0 ? next * sizes[axis] : 1) + between(0, 2);
        }
        int64_t last = 0;
        for (size_t axis = 0; axis < sizes.size(); ++axis) {
            if (sizes[axis] == 0) length = 0;
            last += (sizes[axis] - 1) * strides[axis];
        }
        if (length) length = last + 1;
        memory = std::malloc(static_cast<size_t>(length ? length : 1) * bytes);
    }
    Operand(const Operand &) = delete;
    ~Operand() { std::free(memory); }
};

template <class Number> struct TensorOf : Operand {
    Number *data;

    TensorOf(std::vector<int64_t> given, bool contiguous_last)
        : Operand(std::move(given), contiguous_last, sizeof(Number)), data(static_cast<Number *>(memory)) {
        for (int64_t i = 0; i < length; ++i) {
            const float random = std::uniform_real_distribution<float>(-2.0f, 2.0f)(randoms);
            data[i] = static_cast<Number>(sizeof(Number) == 1 ? 128 + 60 * random : random);
        }
    }

    Number &at(int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) const {
        const int64_t index[] = {a, b, c, d};
        int64_t place = 0;
        for (size_t axis = 0; axis < sizes.size(); ++axis) place += index[axis] * strides[axis];
        return data[place];
    }
};

using Tensor = TensorOf<float>;
using Codes = TensorOf<uint8_t>;

struct Plan {
    prequant_step step{};
    std::vector<char *> addresses;

    Plan(int64_t kind, const std::vector<int64_t> &sizes, const std::vector<const Operand *> &operands) {
        step.kind = kind;
        for (size_t i = 0; i < sizes.size(); ++i) step.sizes[i] = sizes[i];
        for (size_t i = 0; i < PREQUANT_OPERANDS; ++i) {
            const Operand *tensor = i < operands.size() ? operands[i] : nullptr;
            step.operands[i].buffer = tensor ? static_cast<int64_t>(i) : -1;
            addresses.push_back(tensor ? static_cast<char *>(tensor->memory) : nullptr);
            for (size_t axis = 0; tensor && axis < tensor->strides.size(); ++axis) {
                step.operands[i].strides[axis] = tensor->strides[axis];
            }
        }
    }

    bool run(const char *isa) {
        const auto threads = static_cast<int32_t>(between(1, 3));
        // Several times the same: what follows finds what went before.
        const std::vector<prequant_step> steps(3, step);
        const int64_t bytes = prequant_plan_scratch(steps.data(), 3, threads, isa);
        if (bytes < 0) return false;
        void *scratch = std::aligned_alloc(64, static_cast<size_t>(bytes ? bytes : 64));
        int64_t failed = -1;
        const int32_t status = prequant_run_plan(steps.data(), 3, addresses.data(), scratch, bytes, threads, isa, &failed);
        std::free(scratch);
        return status == PREQUANT_OK && failed == -1;
    }
};

bool near(double found, double exact) { return std::fabs(found - exact) <= 2e-5 * (1.0 + std::fabs(exact)); }

bool normalizes(const char *isa) {
    const int64_t rows = between(0, 40), columns = between(1, between(0, 9) ? 70 : 900);
    const bool centered = between(0, 1);
    Tensor in({rows, columns}, true), out({rows, columns}, true), weight({columns}, true), bias({columns}, true);
    Plan plan(PREQUANT_STEP_NORMALIZE, {rows, columns}, {&in, &out, &weight, between(0, 1) ? &bias : nullptr});
    plan.step.option = centered;
    plan.step.number = 1e-2;
    if (!plan.run(isa)) return false;
    for (int64_t r = 0; r < rows; ++r) {
        double mean = 0, squares = 0;
        for (int64_t c = 0; c < columns; ++c) mean += centered ? in.at(r, c) / static_cast<double>(columns) : 0;
        for (int64_t c = 0; c < columns; ++c) squares += (in.at(r, c) - mean) * (in.at(r, c) - mean);
        const double factor = 1 / std::sqrt(squares / static_cast<double>(columns) + 1e-2);
        for (int64_t c = 0; c < columns; ++c) {
            const double added = plan.addresses[3] ? bias.at(c) : 0;
            if (!near(out.at(r, c), (in.at(r, c) - mean) * factor * weight.at(c) + added)) return false;
        }
    }
    return true;
}

bool maps(const char *isa, int function) {
    const std::vector<int64_t> sizes{between(0, 3), between(1, 4), between(1, 5), between(1, between(0, 5) ? 40 : 3000)};
    Tensor a(sizes, between(0, 1)), b(sizes, between(0, 1)), out(sizes, true);
    Plan plan(PREQUANT_STEP_ELEMENTWISE, sizes, {&a, between(0, 1) ? &b : nullptr, &out});
    plan.step.option = function;
    plan.step.number = 0.5;
    if (!plan.run(isa)) return false;
    for (int64_t i = 0; i < sizes[0]; ++i) {
        for (int64_t l = 0; l < sizes[3]; ++l) {
            const double x = a.at(i, 0, 0, l), y = plan.addresses[1] ? b.at(i, 0, 0, l) : 0.5;
            const double found = out.at(i, 0, 0, l);
            if (function == PREQUANT_ADD && !near(found, x + y)) return false;
            if (function == PREQUANT_DIVIDE && std::fabs(y) > 0.1 && !near(found, x / y)) return false;
            if (function == PREQUANT_TANH && !near(found, std::tanh(x))) return false;
            if (function == PREQUANT_SILU && !near(found, x / (1 + std::exp(-x)))) return false;
            if (function == PREQUANT_APPLY_GELU && !near(found, x * 0.5 * std::erfc(-x * std::sqrt(0.5)))) return false;
        }
    }
    return true;
}

bool copies(const char *isa) {
    const std::vector<int64_t> sizes{between(0, 3), between(1, 9), between(1, 9), between(1, 70)};
    Tensor in(sizes, between(0, 1)), out(sizes, between(0, 1));
    Plan plan(PREQUANT_STEP_COPY, {sizes[0], sizes[1], sizes[2], sizes[3], 4}, {&in, &out});
    if (!plan.run(isa)) return false;
    for (int64_t i = 0; i < sizes[0]; ++i) {
        for (int64_t l = 0; l < sizes[3]; ++l) {
            if (out.at(i, sizes[1] - 1, 0, l) != in.at(i, sizes[1] - 1, 0, l)) return false;
        }
    }
    return true;
}

// What a code stands for.
double value_of(const Codes &codes, const Tensor &scales, int64_t a, int64_t b, int64_t c, int64_t d) {
    return (codes.at(a, b, c, d) - PREQUANT_CODE_ZERO) * static_cast<double>(scales.at(a, b, c));
}

bool quantizes(const char *isa) {
    const std::vector<int64_t> sizes{between(0, 3), between(1, 4), between(1, 9), between(1, 70)};
    const std::vector<int64_t> rows{sizes[0], sizes[1], sizes[2], 1};
    Tensor in(sizes, between(0, 1)), scales(rows, true), out(sizes, between(0, 1));
    Codes codes(sizes, true);
    if (!Plan(PREQUANT_STEP_QUANTIZE, sizes, {&in, &codes, &scales}).run(isa)) return false;
    if (!Plan(PREQUANT_STEP_DEQUANTIZE, sizes, {&codes, &scales, &out}).run(isa)) return false;
    for (int64_t i = 0; i < sizes[0]; ++i) {
        const int64_t j = sizes[1] - 1, k = sizes[2] - 1;
        double largest = 0;
        for (int64_t l = 0; l < sizes[3]; ++l) largest = std::fmax(largest, std::fabs(in.at(i, j, k, l)));
        if (!near(scales.at(i, j, k) * 127.0, largest)) return false;
        for (int64_t l = 0; l < sizes[3]; ++l) {
            if (!near(out.at(i, j, k, l), value_of(codes, scales, i, j, k, l))) return false;
            if (std::fabs(out.at(i, j, k, l) - in.at(i, j, k, l)) > 0.51 * scales.at(i, j, k)) return false;
        }
    }
    return true;
}

bool attends(const char *isa) {
    const int64_t batch = between(0, 2), shared = between(1, 2), key_heads = between(1, 2), heads = shared * key_heads;
    const int64_t queries = between(0, 3) ? between(1, 6) : between(30, 70), keys = between(0, 140);
    const int64_t depth = between(1, 70), value_depth = between(1, 70);
    Tensor query({batch, heads, queries, depth}, true), key({batch, key_heads, keys, depth}, true);
    Tensor value({batch, key_heads, keys, value_depth}, true), mask({batch, heads, queries, keys}, between(0, 1));
    Tensor out({batch, heads, queries, value_depth}, true);
    Codes key_codes(key.sizes, true), value_codes(value.sizes, true);
    Tensor key_scales({batch, key_heads, keys, 1}, true), value_scales({batch, key_heads, keys, 1}, true);
    for (int64_t i = 0; i < key_scales.length; ++i) key_scales.data[i] *= 0.01f;
    const bool masked = between(0, 1), of_codes = between(0, 1);
    std::vector<const Operand *> operands{&query, &key, &value, masked ? &mask : nullptr, &out};
    if (of_codes) {
        operands = {&query, &key_codes, &value_codes, operands[3], &out, &key_scales, &value_scales};
    }
    Plan plan(PREQUANT_STEP_ATTENTION, {batch, heads, queries, keys, depth, value_depth, key_heads}, operands);
    plan.step.option = masked ? PREQUANT_MASK_FLOAT : PREQUANT_MASK_NONE;
    plan.step.number = 0.2;
    if (!plan.run(isa)) return false;
    const auto key_at = [&](int64_t b, int64_t h, int64_t k, int64_t d) {
        return of_codes ? value_of(key_codes, key_scales, b, h, k, d) : key.at(b, h, k, d);
    };
    const auto value_at = [&](int64_t b, int64_t h, int64_t k, int64_t d) {
        return of_codes ? value_of(value_codes, value_scales, b, h, k, d) : value.at(b, h, k, d);
    };
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t h = heads - 1, q = queries - 1;
        std::vector<double> weights(static_cast<size_t>(keys));
        double sum = 0, largest = 0;
        for (int64_t k = 0; k < keys; ++k) {
            double score = 0;
            for (int64_t d = 0; d < depth; ++d) score += 0.2 * query.at(b, h, q, d) * key_at(b, h / shared, k, d);
            sum += weights[static_cast<size_t>(k)] = std::exp(score + (masked ? mask.at(b, h, q, k) : 0));
        }
        for (int64_t d = 0; d < value_depth; ++d) {
            double exact = 0;
            for (int64_t k = 0; k < keys; ++k) {
                const double one = value_at(b, h / shared, k, d);
                exact += weights[static_cast<size_t>(k)] / sum * one;
                largest = std::fmax(largest, std::fabs(one));
            }
            if (std::fabs(out.at(b, h, q, d) - exact) > 2e-5 * (1.0 + largest)) return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    const char *widest = prequant_isa();
    int count = 0;
    omp_set_num_threads(3);  // the kernels run on the libgomp of the process: this brings one
    for (const char *isa : {"scalar", "avx2", "avx512vnni", "amx"}) {
        for (int round = 0; round < 120; ++round) {
            const int function = round % (PREQUANT_NEGATE + 1);
            const char *failed = !normalizes(isa)       ? "normalize"
                                 : !maps(isa, function) ? "elementwise"
                                 : !copies(isa)         ? "copy"
                                 : !quantizes(isa)      ? "quantize"
                                 : !attends(isa)        ? "attention"
                                                        : nullptr;
            count += 5;
            if (failed) {
                std::printf("%s fails on %s in round %d (function %d)\n", failed, isa, round, function);
                return 1;
            }
        }
        if (std::strcmp(isa, widest) == 0) break;
    }
    std::printf("%d cases up to %s\n", count, widest);
    return 0;
}
