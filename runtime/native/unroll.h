// How the kernels' loops are made flat, and the arithmetic that their sizes take.

#ifndef PREQUANT_UNROLL_H
#define PREQUANT_UNROLL_H

namespace {

// A unit that is to be small rather than fast defines these as less.
#ifndef PREQUANT_INLINE
#define PREQUANT_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define PREQUANT_UNROLL _Pragma("unroll")
#else
#define PREQUANT_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

constexpr int smallest(int a, int b) { return a < b ? a : b; }
constexpr int between(int low, int value, int high) { return value < low ? low : smallest(value, high); }

}  // namespace

#endif
