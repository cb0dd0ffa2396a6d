// Rounding of floats to the levels of a format, and its gradients (prequant_round), to the last bit the reference's:
// quotients are quotients, and no product is joined to a sum. Each unit that includes this gets a copy of its own,
// compiled with its own flags: hence the unnamed namespace.
//
// A row is cut where a group ends, and where kLanes no longer fit. What fills up the last lanes is 0, as are their
// gradients, so that they add nothing to a sum; nothing is read or written past the end. Sums are doubles, over the
// elements of one row that share a scale, in an order that no number of threads changes.

#ifndef PREQUANT_ROUNDING_ROWS_H
#define PREQUANT_ROUNDING_ROWS_H

#include "activations.h"
#include "float_bits.h"
#include "kernels.h"

namespace {

using namespace prequant;

// The sum of many vectors' lanes.
class LaneSums {
public:
    void add(Floats floats) {
#if defined(__AVX512F__)
        const auto v = reinterpret_cast<__m512>(floats);
        low_ += _mm512_cvtps_pd(_mm512_castps512_ps256(v));
        high_ += _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
        const auto v = reinterpret_cast<__m256>(floats);
        low_ += _mm256_cvtps_pd(_mm256_castps256_ps128(v));
        high_ += _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
        for (int i = 0; i < kHalf; ++i) {
            low_[i] += static_cast<double>(floats[i]);
            high_[i] += static_cast<double>(floats[kHalf + i]);
        }
#endif
    }

    double total() const {
        const Doubles both = low_ + high_;
        double sum = 0.0;
        for (int i = 0; i < kHalf; ++i) sum += both[i];
        return sum;
    }

private:
    static constexpr int kHalf = kLanes / 2;
    using Doubles = double __attribute__((vector_size(kHalf * sizeof(double))));
    Doubles low_{}, high_{};
};

// Ties to even. A sum with kRounding rounds magnitudes up to 2^22; what becomes 0 keeps its sign.
inline Floats rounded(Floats x) {
    const auto sign = reinterpret_cast<FloatWords>(x) & ~kMagnitude;
    const Floats whole = (magnitude(x) + kRounding) - kRounding;
    return reinterpret_cast<Floats>(reinterpret_cast<FloatWords>(whole) | sign);
}

// How the elements that share a scale are rounded, for each scheme: to which `value`, and how that changes with the scale
// (`slope`). Affine formats clip: beyond the outermost levels, a value does not follow its element.
struct AffineLevels {
    static constexpr bool kClips = true;
    Floats scale, zero, top;

    AffineLevels(const prequant_rounding &r, float scale_, const float *zero_)
        // A scale that crossed 0 counts by its magnitude, and never as 0; NaN stays.
        : scale(all_of(scale_ < kSmallestNormal ? kSmallestNormal : scale_)),
          zero(all_of(zero_ ? *zero_ : static_cast<float>(r.levels / 2))),
          top(all_of(static_cast<float>(r.levels - 1))) {}

    // The code before it is cut off at 0 and top, but never so far beyond them that `rounded` would not do.
    Floats code(Floats ratio) const {
        const Floats exact = ratio + zero;
        const Floats above = exact < -2.0f ? all_of(-2.0f) : exact;  // NaN stays
        return rounded(above > top + 2.0f ? top + 2.0f : above);
    }
    Floats cut_off(Floats code) const {
        const Floats above = code < 0.0f ? Floats{} : code;
        return above > top ? top : above;
    }
    Floats value(Floats x) const { return (cut_off(code(x / scale)) - zero) * scale; }

    // gradient * slope, and the gradient where nothing is clipped, and where something is.
    struct Gradients { Floats to_scale, inside, outside; };
    Gradients gradients(Floats gradient, Floats x) const {
        const Floats ratio = x / scale, whole = code(ratio), cut = cut_off(whole), level = cut - zero;
        const auto inside = whole == cut;  // false for NaN
        return {gradient * (inside ? level - ratio : level), inside ? gradient : Floats{}, inside ? Floats{} : gradient};
    }
};

struct TernaryLevels {
    static constexpr bool kClips = false;
    Floats scale, threshold;

    TernaryLevels(const prequant_rounding &, float scale_, const float *threshold_)
        : scale(all_of(scale_)), threshold(all_of(threshold_ ? *threshold_ : scale_ / 2.0f)) {}

    // 0 has no sign: not even a threshold below 0 gives it one.
    Floats level(Floats x) const {
        const auto sign = reinterpret_cast<FloatWords>(x) & ~kMagnitude;
        const auto one = reinterpret_cast<Floats>(sign | bits_of(1.0f));
        const Floats signed_one = x == 0.0f ? Floats{} : one;
        const Floats level = magnitude(x) > threshold ? signed_one : Floats{};
        return x != x ? x : level;
    }
    Floats value(Floats x) const { return level(x) * scale; }
    Floats slope(Floats x) const { return level(x); }
};

struct BinaryLevels {
    static constexpr bool kClips = false;
    Floats scale;

    BinaryLevels(const prequant_rounding &, float scale_, const float *) : scale(all_of(scale_)) {}

    Floats slope(Floats x) const {
        const Floats level = x >= 0.0f ? all_of(1.0f) : all_of(-1.0f);  // 0 is no third level
        return x != x ? x : level;
    }
    Floats value(Floats x) const { return slope(x) * scale; }
};

template <class Levels> void round_elements(const Levels &levels, const float *input, int64_t count, float *out) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) store(out + k, levels.value(load(input + k)));
    if (k < count) store_some(out + k, levels.value(load_some(input + k, count - k)), count - k);
}

// Null for what is not wanted.
struct WantedGradients {
    float *to_input;
    double *to_scale, *to_zero;
};

template <class Levels>
void gradients_of_elements(const Levels &levels, const float *gradient, const float *input, int64_t count,
                           const WantedGradients &out) {
    LaneSums to_scale, to_zero;
    const auto some = [&](Floats g, Floats x, auto write) {
        if constexpr (Levels::kClips) {
            const auto found = levels.gradients(g, x);
            if (out.to_input) write(found.inside);
            if (out.to_scale) to_scale.add(found.to_scale);
            if (out.to_zero) to_zero.add(found.outside);
        } else {
            to_scale.add(g * levels.slope(x));
        }
    };
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        some(load(gradient + k), load(input + k), [&](Floats to_input) { store(out.to_input + k, to_input); });
    }
    if (const int64_t left = count - k; left > 0) {
        some(load_some(gradient + k, left), load_some(input + k, left),
             [&](Floats to_input) { store_some(out.to_input + k, to_input, left); });
    }
    if (out.to_scale) *out.to_scale = to_scale.total();
    if (out.to_zero) *out.to_zero = to_zero.total();
}

// Calls work(levels, begin, count, sums) for the elements of each scale in rows [first, last): which are so many from
// `begin` on, and have their sums at that place.
template <class Levels, class Work>
void for_each_scale(const prequant_rounding &r, int64_t first, int64_t last, Work work) {
    const int64_t width = r.group_size ? r.group_size : r.columns;
    const int64_t groups = (r.columns + width - 1) / width;
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = row * r.columns, scales = r.shared_scale ? 0 : row * groups;
        const int64_t columns = r.elements - begin < r.columns ? r.elements - begin : r.columns;
        for (int64_t group = 0; group * width < columns; ++group) {
            const int64_t start = group * width, count = columns - start < width ? columns - start : width;
            const float scale = float_of(bits_of(r.scales[scales + group]) & kMagnitude);
            const Levels levels(r, scale, r.zeros ? r.zeros + scales + group : nullptr);
            work(levels, begin + start, count, row * groups + group);
        }
    }
}

template <class Levels>
void round_rows_to(const prequant_rounding &r, const float *input, int64_t first, int64_t last, float *out) {
    for_each_scale<Levels>(r, first, last, [&](const Levels &levels, int64_t begin, int64_t count, int64_t) {
        round_elements(levels, input + begin, count, out + begin);
    });
}

inline void round_rows(const prequant_rounding &r, const float *input, int64_t first, int64_t last, float *out) {
    switch (r.levels) {
        case 2: return round_rows_to<BinaryLevels>(r, input, first, last, out);
        case 3: return round_rows_to<TernaryLevels>(r, input, first, last, out);
        default: return round_rows_to<AffineLevels>(r, input, first, last, out);
    }
}

template <class Levels>
void round_gradients_to(const prequant_rounding &r, const float *gradient, const float *input, int64_t first,
                        int64_t last, float *to_input, double *to_scale, double *to_zero) {
    for_each_scale<Levels>(r, first, last, [&](const Levels &levels, int64_t begin, int64_t count, int64_t sum) {
        const WantedGradients out{to_input ? to_input + begin : nullptr, to_scale ? to_scale + sum : nullptr,
                                  to_zero ? to_zero + sum : nullptr};
        gradients_of_elements(levels, gradient + begin, input + begin, count, out);
    });
}

inline void round_gradients(const prequant_rounding &r, const float *gradient, const float *input, int64_t first,
                            int64_t last, float *to_input, double *to_scale, double *to_zero) {
    const auto run = [&](auto of) { of(r, gradient, input, first, last, to_input, to_scale, to_zero); };
    switch (r.levels) {
        case 2: return run(round_gradients_to<BinaryLevels>);
        case 3: return run(round_gradients_to<TernaryLevels>);
        default: return run(round_gradients_to<AffineLevels>);
    }
}

}  // namespace

#endif
