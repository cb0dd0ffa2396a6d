#include "activation_tables.h"

#include <cmath>

namespace prequant {

namespace {

// P(X > z) of the normal distribution.
double normal_tail(double z) { return 0.5 * std::erfc(z * std::sqrt(0.5)); }

// (1 - tanh(u)) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3).
double tanh_tail(double z) {
    const double pi = 3.14159265358979323846;
    return 1.0 / (1.0 + std::exp(2.0 * std::sqrt(2.0 / pi) * (z + 0.044715 * z * z * z)));
}

}  // namespace

// In each interval the polynomial through Chebyshev's points, whose error is close to the smallest possible: below 1e-9.
ActivationTable::ActivationTable(double (*share)(double)) : coefficients{} {
    constexpr int count = kDegree + 1;
    for (int n = 0; n + 1 < kIntervals; ++n) {
        double at[count], newton[count], powers[count] = {};
        for (int i = 0; i < count; ++i) {
            at[i] = 0.5 * kWidth * std::cos((2 * i + 1) * 3.14159265358979323846 / (2 * count));
            newton[i] = share(n * kWidth + at[i]);
        }
        for (int order = 1; order < count; ++order) {  // divided differences, in place
            for (int i = kDegree; i >= order; --i) newton[i] = (newton[i] - newton[i - 1]) / (at[i] - at[i - order]);
        }
        for (int i = kDegree; i >= 0; --i) {  // powers = newton[i] + (t - at[i]) powers
            for (int k = kDegree; k > 0; --k) powers[k] = powers[k - 1] - at[i] * powers[k];
            powers[0] = newton[i] - at[i] * powers[0];
        }
        for (int k = 0; k < count; ++k) coefficients[k][n] = static_cast<float>(powers[k]);
    }
}

const ActivationTable gelu_table(normal_tail), gelu_tanh_table(tanh_tail);

}  // namespace prequant
