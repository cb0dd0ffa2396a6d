// Memory for the kernels: aligned, and in large pages where it is large (runtime/memory.py).

#ifndef PREQUANT_TORCH_MEMORY_H
#define PREQUANT_TORCH_MEMORY_H

#include <cstdint>
#include <memory>

namespace prequant_torch {

// So many uninitialised bytes that begin at a multiple of 64. Throws std::bad_alloc.
std::shared_ptr<void> aligned_bytes(int64_t count);

// Hands out parts of large pieces. A piece lives as long as any part of it, or while parts are taken of it. One thread
// at a time.
class Pool {
public:
    std::shared_ptr<void> take(int64_t count);

private:
    std::shared_ptr<void> piece_;
    int64_t used_ = 0;
};

}  // namespace prequant_torch

#endif
