#include "memory.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace prequant_torch {

namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kLargePage = int64_t{1} << 21;
constexpr int64_t kPiece = 16 * kLargePage;

int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace

std::shared_ptr<void> aligned_bytes(int64_t count) {
    const int64_t alignment = count < kLargePage ? kAlignment : kLargePage;
    const auto size = static_cast<size_t>(rounded_up(count > 0 ? count : 1, alignment));
    void *memory = std::aligned_alloc(static_cast<size_t>(alignment), size);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    // Kernels walk through memory in strides, and with small pages they would wait for the page tables. A system that
    // has no large ones says so, which makes no difference.
    if (alignment == kLargePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return std::shared_ptr<void>(memory, std::free);
}

std::shared_ptr<void> Pool::take(int64_t count) {
    if (count > kPiece / 2) return aligned_bytes(count);
    if (!piece_ || used_ + count > kPiece) {
        piece_ = aligned_bytes(kPiece);
        used_ = 0;
    }
    std::shared_ptr<void> part(piece_, static_cast<char *>(piece_.get()) + used_);
    used_ += rounded_up(count, kAlignment);
    return part;
}

}  // namespace prequant_torch
