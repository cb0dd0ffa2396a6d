// The float kernels (float_kernels.h), written once over the processor's vectors. Each unit that includes this is
// compiled for an instruction set of its own, with products and sums joined where it can: hence the unnamed namespace.

#ifndef PREQUANT_FLOAT_VECTORS_H
#define PREQUANT_FLOAT_VECTORS_H

#include <cmath>
#include <cstring>

#include "activations.h"
#include "float_kernels.h"

namespace {

using namespace prequant;

inline float sum_of(Floats floats) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(floats));
#else
    float lanes[kLanes];
    store(lanes, floats);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
#endif
}

// NaN, if there is one.
inline float largest_of(Floats floats) {
#ifdef __AVX512F__
    const auto v = reinterpret_cast<__m512>(floats);
    return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) ? NAN : _mm512_reduce_max_ps(v);
#else
    float lanes[kLanes], largest = -INFINITY;
    store(lanes, floats);
    for (float lane : lanes) largest = lane > largest || lane != lane ? lane : largest;
    return largest;
#endif
}

// ---- rows -----------------------------------------------------------------------------------------------------------

template <class Term> inline float sum_over(const float *row, int64_t columns, Term term) {
    Floats sums[4] = {};
    int64_t k = 0;
    for (; k + 4 * kLanes <= columns; k += 4 * kLanes) {
        for (int i = 0; i < 4; ++i) sums[i] += term(load(row + k + i * kLanes));
    }
    for (; k + kLanes <= columns; k += kLanes) sums[0] += term(load(row + k));
    float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; k < columns; ++k) sum += term(all_of(row[k]))[0];
    return sum;
}

inline void normalize_row(const float *row, const float *weight, const float *bias, float epsilon, bool centered,
                          float *out, int64_t columns) {
    const float count = static_cast<float>(columns);
    const float mean = centered ? sum_over(row, columns, [](Floats x) { return x; }) / count : 0.0f;
    float rest = 0.0f;  // what rounding left of the mean
    float squares = sum_over(row, columns, [mean](Floats x) { return (x - mean) * (x - mean); });
    if (centered && mean * mean * count > squares) {
        // Numbers far from 0: it is not small beside their distances from the mean.
        rest = sum_over(row, columns, [mean](Floats x) { return x - mean; }) / count;
        squares = sum_over(row, columns, [mean, rest](Floats x) { return (x - mean - rest) * (x - mean - rest); });
    }
    const float factor = 1.0f / std::sqrt(squares / count + epsilon);
    const auto one = [&](Floats x, Floats w, Floats b) { return (x - mean - rest) * factor * w + b; };
    int64_t k = 0;
    for (; k + kLanes <= columns; k += kLanes) {
        store(out + k, one(load(row + k), weight ? load(weight + k) : all_of(1.0f), bias ? load(bias + k) : Floats{}));
    }
    if (const int64_t left = columns - k; left > 0) {
        const Floats w = weight ? load_some(weight + k, left) : all_of(1.0f);
        store_some(out + k, one(load_some(row + k, left), w, bias ? load_some(bias + k, left) : Floats{}), left);
    }
}

inline void normalize(const Strided &in, const float *weight, const float *bias, float epsilon, bool centered,
                      const Strided &out, int64_t columns, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        normalize_row(in.floats() + row * in.strides[0], weight, bias, epsilon, centered,
                      out.floats() + row * out.strides[0], columns);
    }
}

// ---- element by element ---------------------------------------------------------------------------------------------

// (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x; near 0, where that cancels, the series.
inline Floats hyperbolic_tangent(Floats x) {
    const Floats size = magnitude(x), square = x * x;
    const Floats e = exponential(-2.0f * size);
    const Floats far = (1.0f - e) / (1.0f + e);
    const Floats near = x + x * square * (square * (square * -0.0539682540f + 0.1333333333f) - 0.3333333333f);
    const Floats signed_far = x < 0.0f ? -far : far;
    return x != x ? x : size < 0.15f ? near : signed_far;
}

// 1 / (1 + e^-x), by the exponential of what is not positive.
inline Floats logistic(Floats x) {
    const Floats size = magnitude(x);
    const Floats e = exponential(-size);
    const Floats value = (x < 0.0f ? e : all_of(1.0f)) / (1.0f + e);
    return x != x ? x : value;
}

template <class Function>
inline void map_row(Function function, const float *a, int64_t a_step, const float *b, int64_t b_step, float *out,
                    int64_t count) {
    const auto read = [](const float *from, int64_t step, int64_t k, int64_t lanes) {
        if (!from) return Floats{};
        if (step == 0) return all_of(*from);
        if (step == 1) return lanes == kLanes ? load(from + k) : load_some(from + k, lanes);
        Floats gathered{};
        for (int64_t i = 0; i < lanes; ++i) gathered[i] = from[(k + i) * step];
        return gathered;
    };
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) store(out + k, function(read(a, a_step, k, kLanes), read(b, b_step, k, kLanes)));
    if (const int64_t left = count - k; left > 0) {
        store_some(out + k, function(read(a, a_step, k, left), read(b, b_step, k, left)), left);
    }
}

inline void elementwise(enum prequant_function function, const float *a, int64_t a_step, const float *b, int64_t b_step,
                        float *out, int64_t count) {
    const auto with = [&](auto f) { map_row(f, a, a_step, b, b_step, out, count); };
    switch (function) {
        case PREQUANT_ADD: return with([](Floats x, Floats y) { return x + y; });
        case PREQUANT_SUBTRACT: return with([](Floats x, Floats y) { return x - y; });
        case PREQUANT_MULTIPLY: return with([](Floats x, Floats y) { return x * y; });
        case PREQUANT_DIVIDE: return with([](Floats x, Floats y) { return x / y; });
        case PREQUANT_APPLY_RELU: return with([](Floats x, Floats) { return relu(x); });
        case PREQUANT_APPLY_GELU: return with([](Floats x, Floats) { return gelu(x); });
        case PREQUANT_APPLY_GELU_TANH: return with([](Floats x, Floats) { return gelu_tanh(x); });
        case PREQUANT_TANH: return with([](Floats x, Floats) { return hyperbolic_tangent(x); });
        case PREQUANT_SIGMOID: return with([](Floats x, Floats) { return logistic(x); });
        case PREQUANT_SILU: return with([](Floats x, Floats) { return x * logistic(x); });
        case PREQUANT_NEGATE: return with([](Floats x, Floats) { return -x; });
    }
}

}  // namespace

#endif
