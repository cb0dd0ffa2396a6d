#include "format.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <vector>

#include "errors.h"

namespace prequant_torch {

namespace {

constexpr std::array<std::string_view, 4> kSchemes = {"affine", "ternary", "binary", "bcq"};
constexpr std::array<std::string_view, 3> kGranularities = {"tensor", "row", "group"};

std::vector<std::string_view> split(std::string_view text) {
    std::vector<std::string_view> parts;
    for (size_t colon; (colon = text.find(':')) != std::string_view::npos; text.remove_prefix(colon + 1)) {
        parts.push_back(text.substr(0, colon));
    }
    parts.push_back(text);
    return parts;
}

// Reads `names[i]` and the number behind it, if there is one, and returns i; -1 if `part` is nothing of that kind.
template <size_t N>
int named(std::string_view part, const std::array<std::string_view, N> &names, int64_t &number) {
    const size_t end = std::min(part.find_first_of("0123456789"), part.size());
    if (part.size() - end > 12) return -1;
    for (const char digit : part.substr(end)) {
        if (digit < '0' || digit > '9') return -1;
        number = 10 * number + (digit - '0');
    }
    for (size_t i = 0; i < N; ++i) {
        if (names[i] == part.substr(0, end)) return static_cast<int>(i);
    }
    return -1;
}

bool makes_sense(const Format &format) {
    switch (format.scheme) {
        case Scheme::affine: if (format.bits < 2 || format.bits > 8) return false; break;
        case Scheme::bcq: if (format.bits < 1 || format.bits > 8) return false; break;
        default: break;
    }
    if (format.scheme == Scheme::bcq && format.granularity == Granularity::tensor) return false;
    if ((format.granularity == Granularity::group) != (format.group_size > 0)) return false;
    if (format.group_size > kMostColumns) return false;
    return (format.symmetric || format.scheme == Scheme::affine) && (!format.base3 || format.scheme == Scheme::ternary);
}

}  // namespace

std::string Format::text() const {
    std::string made(kSchemes[static_cast<size_t>(scheme)]);
    if (scheme == Scheme::affine || scheme == Scheme::bcq) made += std::to_string(bits);
    made += ':';
    made += kGranularities[static_cast<size_t>(granularity)];
    if (group_size) made += std::to_string(group_size);
    if (!symmetric) made += ":asym";
    if (base3) made += ":base3";
    return made;
}

Format parse(const char *op, const std::string &text) {
    const auto parts = split(text);
    int64_t bits = 0, group_size = 0;
    const int scheme = named(parts[0], kSchemes, bits);
    const int granularity = parts.size() < 2 ? -1 : named(parts[1], kGranularities, group_size);
    Format format;
    bool known = scheme >= 0 && granularity >= 0 && bits <= 8;
    if (known) {
        format.scheme = static_cast<Scheme>(scheme);
        const bool fixed = format.scheme == Scheme::ternary || format.scheme == Scheme::binary;
        format.bits = fixed ? (format.scheme == Scheme::ternary ? 2 : 1) : static_cast<int>(bits);
        format.granularity = static_cast<Granularity>(granularity);
        format.group_size = group_size;
        for (size_t i = 2; i < parts.size(); ++i) {
            if (parts[i] == "asym") format.symmetric = false;
            if (parts[i] == "base3") format.base3 = true;
        }
        // One text for each format: whatever was passed over above is found here.
        known = makes_sense(format) && format.text() == text;
    }
    PREQUANT_CHECK(known, "'", text, "' is not a weight format; examples: 'affine4:row', 'affine4:group64:asym', ",
                   "'ternary:row:base3'");
    return format;
}

}  // namespace prequant_torch
