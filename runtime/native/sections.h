// Laying out scratch.

#ifndef PREQUANT_SECTIONS_H
#define PREQUANT_SECTIONS_H

#include "panels.h"

namespace prequant {

// Sections of scratch, one after the other; addresses as numbers, so that they can be asked for without memory.
struct Sections {
    uintptr_t next;

    template <class Value> Value *take(int64_t bytes) {
        const uintptr_t start = next;
        next += static_cast<uintptr_t>(round_up(bytes, 64));
        return reinterpret_cast<Value *>(start);
    }
};

}  // namespace prequant

#endif
