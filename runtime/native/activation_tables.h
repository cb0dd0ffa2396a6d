// Tables of GELU's two forms, for processors that look up 16 numbers at once. Both are x times a share S(-x), with
// S(z) + S(-z) = 1, so a table of S for z >= 0 is all that they take.

#ifndef PREQUANT_ACTIVATION_TABLES_H
#define PREQUANT_ACTIVATION_TABLES_H

namespace prequant {

// Interval n reaches half a width to both sides of n * kWidth. The last one, from 6.4 on, is 0: there the products with
// x are below 1e-9.
struct alignas(64) ActivationTable {
    static constexpr int kIntervals = 32;
    static constexpr int kDegree = 5;
    static constexpr float kWidth = 27.0f / 128.0f;

    float coefficients[kDegree + 1][kIntervals];  // of the powers of the distance from an interval's center

    explicit ActivationTable(double (*share)(double));
};

extern const ActivationTable gelu_table, gelu_tanh_table;

}  // namespace prequant

#endif
