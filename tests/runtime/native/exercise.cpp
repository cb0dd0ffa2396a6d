// Runs the native kernels on every format and many shapes against sums in double, with buffers of exactly the size that
// the interface asks for: built with sanitizers, it finds what reads or writes beyond them.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include <omp.h>

#include "prequant_native.h"

namespace {

std::mt19937 randoms(1);

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(randoms); }
float real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(randoms); }

// At a multiple of 64, with nothing behind it.
struct Memory {
    uint8_t *bytes;
    explicit Memory(int64_t size) : bytes(static_cast<uint8_t *>(std::aligned_alloc(64, static_cast<size_t>(size)))) {
        std::memset(bytes, 0xff, static_cast<size_t>(size));
    }
    Memory(const Memory &) = delete;
    ~Memory() { std::free(bytes); }
};

struct Case {
    int rows, columns, bits, terms, base3, multiple, subtrahend, group, asymmetric, outliers, tokens, input;
};

bool fails(const Case &c, const char *isa) {
    const int row_bytes = c.base3 ? (c.columns + 4) / 5 : (c.columns * c.bits + 7) / 8;
    const int groups = c.group ? (c.columns + c.group - 1) / c.group : 1;
    std::vector<uint8_t> codes(static_cast<size_t>(c.terms * c.rows * row_bytes));
    for (auto &byte : codes) byte = static_cast<uint8_t>(between(0, c.base3 ? 242 : 255));
    std::vector<float> scales(static_cast<size_t>(c.terms * c.rows * groups)), zeros(scales.size());
    for (auto &scale : scales) scale = real(0.001f, 0.02f);
    for (auto &zero : zeros) zero = real(0.0f, static_cast<float>((1 << c.bits) - 1));
    std::vector<float> values;
    std::vector<int32_t> places, offsets{0};
    for (int row = 0; row < c.rows; ++row) {
        for (int n = c.outliers ? between(0, 2) : 0; n > 0; --n) {
            places.push_back(between(0, c.columns - 1));
            values.push_back(real(-1.0f, 1.0f));
        }
        offsets.push_back(static_cast<int32_t>(places.size()));
    }
    prequant_weight weight{};
    weight.rows = c.rows;
    weight.columns = c.columns;
    weight.group_size = c.group;
    weight.bits = c.bits;
    weight.terms = c.terms;
    weight.base3 = c.base3;
    weight.multiple = c.multiple;
    weight.subtrahend = c.subtrahend;
    weight.codes = codes.data();
    weight.scales = scales.data();
    weight.zeros = c.asymmetric ? zeros.data() : nullptr;
    weight.outliers = static_cast<int64_t>(values.size());
    weight.outlier_values = values.data();
    weight.outlier_columns = places.data();
    weight.outlier_offsets = offsets.data();

    const int64_t bytes = prequant_panels_bytes(&weight);
    if (bytes < 0) return true;
    Memory panels(bytes);
    if (prequant_pack_panels(&weight, panels.bytes, 2) != PREQUANT_OK) return true;

    std::vector<float> input(static_cast<size_t>(c.tokens * c.columns)), bias(static_cast<size_t>(c.rows));
    for (auto &value : input) value = real(-2.0f, 2.0f);
    for (auto &value : bias) value = real(-1.0f, 1.0f);
    std::vector<float> output(static_cast<size_t>(c.tokens * c.rows));
    const float input_scale = 0.02f;
    prequant_linear linear{};
    linear.panels = panels.bytes;
    linear.bias = bias.data();
    linear.input_scale = &input_scale;
    linear.input_zero = -28.0f;
    linear.input_levels = 256;
    linear.input = c.input;
    const int64_t size = prequant_linear_scratch(&linear, c.tokens, 3, isa);
    if (size < 0) return true;
    Memory scratch(size < 64 ? 64 : size);
    if (prequant_run_linear(&linear, input.data(), nullptr, output.data(), c.tokens, scratch.bytes, size, 3, isa)) return true;

    std::vector<int64_t> rows(static_cast<size_t>(c.tokens));
    for (auto &row : rows) row = between(0, c.rows - 1);
    std::vector<float> taken(static_cast<size_t>(c.tokens * c.columns));
    if (prequant_dequantize(&weight, rows.data(), c.tokens, taken.data(), 3, isa)) return true;
    for (const float value : taken) {
        if (!(std::fabs(value) < 100.0f)) return true;
    }

    for (int token = 0; token < c.tokens; ++token) {
        const float *x = input.data() + token * c.columns;
        float largest = 0.0f;
        for (int k = 0; k < c.columns; ++k) largest = std::fmax(largest, std::fabs(x[k]));
        std::vector<double> seen(static_cast<size_t>(c.columns));
        for (int k = 0; k < c.columns; ++k) {
            const float scale = c.input == PREQUANT_INPUT_STATIC ? input_scale : largest / 127.0f;
            const float zero = c.input == PREQUANT_INPUT_STATIC ? 100.0f : 128.0f;
            const float code = std::fmin(std::fmax(std::nearbyintf(x[k] / scale + zero), 0.0f), 255.0f);
            seen[k] = c.input == PREQUANT_INPUT_FLOAT ? x[k] : (double{code} - zero) * scale;
        }
        for (int row = 0; row < c.rows; ++row) {
            double sum = bias[row], size_of_sum = std::fabs(bias[row]);
            for (int k = 0; k < c.columns; ++k) {
                for (int term = 0; term < c.terms; ++term) {
                    const uint8_t *of_row = codes.data() + (term * c.rows + row) * row_bytes;
                    static const int powers[] = {1, 3, 9, 27, 81};
                    unsigned code = 0;
                    for (int b = 0; b < c.bits; ++b) code |= (of_row[(k * c.bits + b) / 8 % row_bytes] >> (k * c.bits + b) % 8 & 1u) << b;
                    if (c.base3) code = of_row[k / 5] / powers[k % 5] % 3;
                    const size_t i = static_cast<size_t>((term * c.rows + row) * groups + (c.group ? k / c.group : 0));
                    const double zero = c.asymmetric ? zeros[i] : c.subtrahend;
                    const double product = (c.multiple * static_cast<int>(code) - zero) * scales[i] * seen[k];
                    sum += product;
                    size_of_sum += std::fabs(product);
                }
            }
            for (int32_t i = offsets[row]; i < offsets[row + 1]; ++i) {
                sum += values[i] * seen[places[i]];
                size_of_sum += std::fabs(values[i] * seen[places[i]]);
            }
            if (!(std::fabs(output[token * c.rows + row] - sum) <= 1e-5 * size_of_sum)) return true;
        }
    }
    return false;
}

}  // namespace

int main() {
    const char *widest = prequant_isa();
    int count = 0;
    omp_set_num_threads(3);  // the kernels run on the libgomp of the process: this brings one
    for (const char *isa : {"scalar", "avx2", "avx512vnni", "amx"}) {
        for (int bits = 1; bits <= 8; ++bits) {
            for (int round = 0; round < 24; ++round) {
                Case c{};
                c.rows = between(1, 50);
                c.columns = between(1, 200);
                c.bits = bits;
                c.terms = bits == 1 ? between(1, 3) : 1;
                c.base3 = bits == 2 && round % 3 == 0;
                c.multiple = bits == 1 ? 2 : 1;
                c.subtrahend = bits == 1 || c.base3 ? 1 : 1 << (bits - 1);
                const int groups[] = {0, 32, 64, 96};
                c.group = groups[between(0, 3)];
                c.asymmetric = bits > 1 && !c.base3 && between(0, 1);
                c.outliers = between(0, 1);
                const int tokens[] = {0, 1, 2, 3, 7, 8, 17, 33};
                c.tokens = tokens[between(0, 7)];
                c.input = between(0, 2);
                ++count;
                if (fails(c, isa)) {
                    std::printf("%s fails: rows %d columns %d bits %d terms %d base3 %d group %d asymmetric %d outliers %d tokens %d input %d\n",
                                isa, c.rows, c.columns, c.bits, c.terms, c.base3, c.group, c.asymmetric, c.outliers, c.tokens, c.input);
                    return 1;
                }
            }
        }
        if (std::strcmp(isa, widest) == 0) break;
    }
    std::printf("%d cases up to %s\n", count, widest);
    return 0;
}
