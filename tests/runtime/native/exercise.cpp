// Runs the native kernels on every format and many shapes against sums in double, with buffers of exactly the size that
// the interface asks for: built with sanitizers, it finds what reads or writes beyond them.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
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
    int rows, columns, bits, terms, base3, multiple, subtrahend, group, asymmetric, outliers, input;

    void print() const {
        std::printf("rows %d columns %d bits %d terms %d base3 %d group %d asymmetric %d outliers %d input %d\n", rows,
                    columns, bits, terms, base3, group, asymmetric, outliers, input);
    }
};

Case random_case(int bits, bool base3, int columns) {
    Case c{};
    c.rows = between(1, 50);
    c.columns = columns;
    c.bits = bits;
    c.terms = bits == 1 ? between(1, 3) : 1;
    c.base3 = base3;
    c.multiple = bits == 1 ? 2 : 1;
    c.subtrahend = bits == 1 || base3 ? 1 : 1 << (bits - 1);
    const int groups[] = {0, 32, 64, 96};
    c.group = groups[between(0, 3)];
    c.asymmetric = bits > 1 && !base3 && between(0, 1);
    c.outliers = between(0, 1);
    c.input = between(0, 2);
    return c;
}

// A random weight of a case, packed, as a linear with a bias.
class Layer {
  public:
    explicit Layer(const Case &given) : c(given) {
        row_bytes = c.base3 ? (c.columns + 4) / 5 : (c.columns * c.bits + 7) / 8;
        groups = c.group ? (c.columns + c.group - 1) / c.group : 1;
        codes.resize(static_cast<size_t>(c.terms * c.rows * row_bytes));
        for (auto &byte : codes) byte = static_cast<uint8_t>(between(0, c.base3 ? 242 : 255));
        scales.resize(static_cast<size_t>(c.terms * c.rows * groups));
        zeros.resize(scales.size());
        for (auto &scale : scales) scale = real(0.001f, 0.02f);
        for (auto &zero : zeros) zero = real(0.0f, static_cast<float>((1 << c.bits) - 1));
        for (int row = 0; row < c.rows; ++row) {
            for (int n = c.outliers ? between(0, 2) : 0; n > 0; --n) {
                places.push_back(between(0, c.columns - 1));
                values.push_back(real(-1.0f, 1.0f));
            }
            offsets.push_back(static_cast<int32_t>(places.size()));
        }
        bias.resize(static_cast<size_t>(c.rows));
        for (auto &value : bias) value = real(-1.0f, 1.0f);
    }

    // False if the library refuses the weight.
    bool pack() {
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
        if (prequant_codes_bytes(&weight) < 0) return false;
        packed_codes = std::make_unique<Memory>(prequant_codes_bytes(&weight));
        packed_scales = std::make_unique<Memory>(prequant_scales_bytes(&weight));
        linear.codes = packed_codes->bytes;
        linear.scales = packed_scales->bytes;
        linear.bias = bias.data();
        linear.input_scale = &input_scale;
        linear.input_zero = -28.0f;
        linear.input_levels = 256;
        linear.input = c.input;
        return prequant_pack_codes(&weight, packed_codes->bytes, 2) == PREQUANT_OK &&
               prequant_pack_scales(&weight, packed_codes->bytes, packed_scales->bytes, 2) == PREQUANT_OK;
    }

    bool dequantizes(int count, const char *isa) const {
        std::vector<int64_t> rows(static_cast<size_t>(count));
        for (auto &row : rows) row = between(0, c.rows - 1);
        std::vector<float> taken(static_cast<size_t>(count * c.columns));
        if (prequant_dequantize(&weight, rows.data(), count, taken.data(), 3, isa)) return false;
        for (const float value : taken) {
            if (!(std::fabs(value) < 100.0f)) return false;
        }
        return true;
    }

    // Whether `output` [tokens][rows] is the product with `input` and `residual` (or none) added.
    bool gave(const float *output, const float *input, const float *residual, int tokens) const {
        for (int token = 0; token < tokens; ++token) {
            const std::vector<double> seen = quantized(input + token * c.columns);
            for (int row = 0; row < c.rows; ++row) {
                const int place = token * c.rows + row;
                double sum = bias[row], size_of_sum = std::fabs(bias[row]);
                const auto add = [&](double product) {
                    sum += product;
                    size_of_sum += std::fabs(product);
                };
                if (residual) add(residual[place]);
                for (int k = 0; k < c.columns; ++k) {
                    for (int term = 0; term < c.terms; ++term) add(value_of(term, row, k) * seen[k]);
                }
                for (int32_t i = offsets[row]; i < offsets[row + 1]; ++i) add(values[i] * seen[places[i]]);
                if (!(std::fabs(output[place] - sum) <= 1e-5 * size_of_sum)) return false;
            }
        }
        return true;
    }

    const Case c;
    prequant_linear linear{};

  private:
    std::vector<double> quantized(const float *x) const {
        float largest = 0.0f;
        for (int k = 0; k < c.columns; ++k) largest = std::fmax(largest, std::fabs(x[k]));
        std::vector<double> seen(static_cast<size_t>(c.columns));
        for (int k = 0; k < c.columns; ++k) {
            const float scale = c.input == PREQUANT_INPUT_STATIC ? input_scale : largest / 127.0f;
            const float zero = c.input == PREQUANT_INPUT_STATIC ? 100.0f : 128.0f;
            const float code = std::fmin(std::fmax(std::nearbyintf(x[k] / scale + zero), 0.0f), 255.0f);
            seen[k] = c.input == PREQUANT_INPUT_FLOAT ? x[k] : (double{code} - zero) * scale;
        }
        return seen;
    }

    double value_of(int term, int row, int k) const {
        const uint8_t *of_row = codes.data() + (term * c.rows + row) * row_bytes;
        static const int powers[] = {1, 3, 9, 27, 81};
        unsigned code = 0;
        if (c.base3) {
            code = of_row[k / 5] / powers[k % 5] % 3;
        } else {
            for (int b = 0; b < c.bits; ++b) code |= (of_row[(k * c.bits + b) / 8] >> (k * c.bits + b) % 8 & 1u) << b;
        }
        const size_t i = static_cast<size_t>((term * c.rows + row) * groups + (c.group ? k / c.group : 0));
        const double zero = c.asymmetric ? zeros[i] : c.subtrahend;
        return (c.multiple * static_cast<int>(code) - zero) * scales[i];
    }

    int row_bytes, groups;
    std::vector<uint8_t> codes;
    std::vector<float> scales, zeros, values, bias;
    std::vector<int32_t> places, offsets{0};
    float input_scale = 0.02f;
    prequant_weight weight{};
    std::unique_ptr<Memory> packed_codes, packed_scales;
};

// All cases on one input, in one call.
bool fail(const std::vector<Case> &cases, int tokens, bool with_residuals, const char *isa) {
    const int columns = cases[0].columns;
    std::vector<std::unique_ptr<Layer>> layers;
    std::vector<const prequant_linear *> linears;
    std::vector<std::vector<float>> outputs, residuals;
    std::vector<void *> output_places;
    std::vector<const void *> residual_places;
    for (const Case &c : cases) {
        layers.push_back(std::make_unique<Layer>(c));
        if (!layers.back()->pack()) return true;
        linears.push_back(&layers.back()->linear);
        outputs.emplace_back(static_cast<size_t>(tokens * c.rows));
        output_places.push_back(outputs.back().data());
        residuals.emplace_back(outputs.back().size());
        for (auto &value : residuals.back()) value = real(-1.0f, 1.0f);
        const bool added = with_residuals && residuals.size() % 2;  // for every other one
        residual_places.push_back(added && tokens ? residuals.back().data() : nullptr);
    }
    std::vector<float> input(static_cast<size_t>(tokens * columns));
    for (auto &value : input) value = real(-2.0f, 2.0f);

    const auto count = static_cast<int32_t>(cases.size());
    prequant_workspace workspace{};
    workspace.isa = isa;
    workspace.threads = 3;
    const auto run = [&] {
        return prequant_run_linears(linears.data(), count, input.data(), with_residuals ? residual_places.data() : nullptr,
                                    output_places.data(), tokens, &workspace);
    };
    int32_t status = run();
    if (status != (workspace.needed ? PREQUANT_SMALL_SCRATCH : PREQUANT_OK)) return true;
    Memory scratch(workspace.needed ? workspace.needed : 64);
    if (workspace.needed) {
        workspace.scratch = scratch.bytes;
        workspace.scratch_bytes = workspace.needed - 1;
        if (run() != PREQUANT_SMALL_SCRATCH) return true;
        workspace.scratch_bytes = workspace.needed;
        if (run() != PREQUANT_OK) return true;
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto *residual = static_cast<const float *>(residual_places[i]);
        if (!layers[i]->gave(outputs[i].data(), input.data(), residual, tokens)) return true;
        if (!layers[i]->dequantizes(tokens, isa)) return true;
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
                const int columns = between(1, 200);
                const int some[] = {0, 1, 2, 3, 7, 8, 17, 33};
                const int tokens = some[between(0, 7)];
                std::vector<Case> cases{random_case(bits, bits == 2 && round % 3 == 0, columns)};
                if (round == 3) cases[0].rows = between(700, 900);  // enough for several threads
                // Some calls with more linears: as they come, or that see the input as the first one does.
                for (int more = round % 4 == 3 ? between(1, 4) : 0; more > 0; --more) {
                    Case c = random_case(between(1, 8), false, columns);
                    if (between(0, 1)) {
                        c.input = cases[0].input;
                        c.group = cases[0].group;
                    }
                    cases.push_back(c);
                }
                ++count;
                if (fail(cases, tokens, between(0, 1), isa)) {
                    std::printf("%s fails with %d tokens:\n", isa, tokens);
                    for (const Case &c : cases) c.print();
                    return 1;
                }
            }
        }
        if (std::strcmp(isa, widest) == 0) break;
    }
    std::printf("%d cases up to %s\n", count, widest);
    return 0;
}
