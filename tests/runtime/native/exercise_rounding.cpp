// Runs prequant_round and prequant_round_gradients on every instruction set with random sizes, on buffers of exactly
// their size, against scalar arithmetic and sums in double: built with sanitizers, it finds what reads or writes beyond.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include <omp.h>

#include "prequant_native.h"

namespace {

std::mt19937 randoms(1);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(randoms); }
float real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(randoms); }

// Memory with nothing behind it.
template <class T> struct Buffer {
    std::unique_ptr<T[]> values;
    int64_t length;

    explicit Buffer(int64_t length_) : values(new T[static_cast<size_t>(length_)]), length(length_) {}
    Buffer(int64_t length_, float low, float high) : Buffer(length_) {
        for (int64_t i = 0; i < length; ++i) values[static_cast<size_t>(i)] = static_cast<T>(real(low, high));
    }
    T &operator[](int64_t i) { return values[static_cast<size_t>(i)]; }
    T *data() { return values.get(); }
};

struct Rounded { float value, level, ratio; bool inside; };

Rounded rounded(const prequant_rounding &r, float x, float scale, const float *zero) {
    const float s = std::fabs(scale);
    if (r.levels == 2) return {x >= 0.0f ? s : -s, x >= 0.0f ? 1.0f : -1.0f, 0.0f, true};
    if (r.levels == 3) {
        const float level = std::fabs(x) > (zero ? *zero : s / 2.0f) ? (x > 0.0f ? 1.0f : -1.0f) : 0.0f;
        return {level * s, level, 0.0f, true};
    }
    const float offset = zero ? *zero : static_cast<float>(r.levels / 2), top = static_cast<float>(r.levels - 1);
    const float ratio = x / s, code = std::nearbyint(ratio + offset);
    const float level = std::fmin(std::fmax(code, 0.0f), top) - offset;
    return {level * s, level, ratio, code >= 0.0f && code <= top};
}

// Whether kernels of that name do anything else than the above.
bool fails(const char *isa, int32_t levels, int64_t rows, int64_t columns, int64_t group, bool shared, bool zeros,
           bool ends_early, int wanted) {
    const int64_t width = group ? group : columns, groups = (columns + width - 1) / width;
    const int64_t elements = rows * columns - (ends_early && !group ? between(0, columns - 1) : 0);
    Buffer<float> input(elements, -12.0f, 12.0f), gradient(elements, -1.0f, 1.0f), out(elements);
    Buffer<float> scales((shared ? 1 : rows) * groups, 0.2f, 2.0f), offsets(scales.length, 0.0f, 3.0f);
    scales[0] = -scales[0];
    const prequant_rounding r{elements,      columns, group, levels, shared, scales.data(),
                              zeros ? offsets.data() : nullptr};
    const bool affine = levels > 3, to_input = affine && (wanted & 1), to_zero = affine && (wanted & 2);
    Buffer<float> input_out(to_input ? elements : 0);
    Buffer<double> scale_out(rows * groups), zero_out(to_zero ? rows * groups : 0);
    if (prequant_round(&r, input.data(), out.data(), 3, isa)) return true;
    if (prequant_round_gradients(&r, gradient.data(), input.data(), to_input ? input_out.data() : nullptr,
                                 scale_out.data(), to_zero ? zero_out.data() : nullptr, 3, isa)) {
        return true;
    }
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t at = (shared ? 0 : row * groups) + g;
            double to_scale = 0.0, clipped = 0.0;
            for (int64_t column = g * width; column < columns && column < (g + 1) * width; ++column) {
                const int64_t i = row * columns + column;
                if (i >= elements) break;
                const Rounded one = rounded(r, input[i], scales[at], r.zeros ? r.zeros + at : nullptr);
                if (out[i] != one.value) return true;
                if (to_input && input_out[i] != (one.inside ? gradient[i] : 0.0f)) return true;
                const bool follows = affine && one.inside;
                to_scale += static_cast<double>(gradient[i] * (follows ? one.level - one.ratio : one.level));
                if (!one.inside) clipped += static_cast<double>(gradient[i]);
            }
            const int64_t sum = row * groups + g;
            const auto near = [](double a, double b) { return std::fabs(a - b) <= 1e-9 * (1.0 + std::fabs(b)); };
            if (!near(scale_out[sum], to_scale) || (to_zero && !near(zero_out[sum], clipped))) return true;
        }
    }
    return false;
}

}  // namespace

int main() {
    const char *widest = prequant_isa();
    int count = 0;
    omp_set_num_threads(3);
    for (const char *isa : {"scalar", "avx2", "avx512vnni", "amx"}) {
        for (int32_t levels : {2, 3, 4, 8, 16, 256}) {
            for (int round = 0; round < 40; ++round) {
                const int64_t rows = round == 0 ? 900 : between(1, 6), columns = between(1, 150);
                const int64_t group = between(0, 1) ? between(1, 70) : 0;
                const bool shared = between(0, 1), zeros = levels != 2 && between(0, 1), early = between(0, 1);
                ++count;
                if (fails(isa, levels, rows, columns, group, shared, zeros, early, static_cast<int>(between(0, 3)))) {
                    std::printf("%s fails: %d levels [%d, %d] group %d shared %d zeros %d\n", isa, levels,
                                static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(group), shared,
                                zeros);
                    return 1;
                }
            }
        }
        if (std::strcmp(isa, widest) == 0) break;
    }
    std::printf("%d cases up to %s\n", count, widest);
    return 0;
}
