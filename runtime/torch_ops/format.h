// What a block of codes means: runtime/formats.py, which says it all, in C++.

#ifndef PREQUANT_TORCH_FORMAT_H
#define PREQUANT_TORCH_FORMAT_H

#include <cstdint>
#include <string>

namespace prequant_torch {

enum class Scheme { affine, ternary, binary, bcq };
enum class Granularity { tensor, row, group };

struct Format {
    Scheme scheme = Scheme::affine;
    int bits = 0;            // of a code; planes of bcq
    Granularity granularity = Granularity::row;
    int64_t group_size = 0;  // 0 unless there are groups
    bool symmetric = true;
    bool base3 = false;      // five ternary codes a byte

    bool one_bit() const { return scheme == Scheme::binary || scheme == Scheme::bcq; }
    int width() const { return one_bit() ? 1 : bits; }  // of a code, in bits
    int levels() const { return scheme == Scheme::affine ? 1 << bits : scheme == Scheme::ternary ? 3 : 2; }
    // The code that stands for 0 in a symmetric affine or ternary format.
    int implied_zero_point() const { return scheme == Scheme::ternary ? 1 : 1 << (bits - 1); }
    int64_t groups(int64_t columns) const {
        return granularity == Granularity::group ? (columns + group_size - 1) / group_size : 1;
    }
    int64_t row_bytes(int64_t columns) const { return base3 ? (columns + 4) / 5 : (columns * width() + 7) / 8; }

    std::string text() const;
};

// No weight is larger, and no size that is computed of columns and group sizes up to it overflows.
constexpr int64_t kMostColumns = int64_t{1} << 40;

// The inverse of Format::text. Throws c10::Error for anything else, with `op` in its message.
Format parse(const char *op, const std::string &text);

}  // namespace prequant_torch

#endif
