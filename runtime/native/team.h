// Threads that go through a list of steps together.

#ifndef PREQUANT_TEAM_H
#define PREQUANT_TEAM_H

#include <atomic>
#include <cstdint>

#include "threads.h"

namespace prequant {

// Where members wait for each other. They look again and again for a while, because steps are shorter than falling asleep
// and waking takes; then they let others have the core.
class Barrier {
public:
    void wait(int32_t members) {
        const uint32_t turn = turn_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (uint32_t looked = 0; turn_.load(std::memory_order_acquire) == turn; ++looked) pause(looked);
    }

private:
    static void pause(uint32_t looked);

    alignas(64) std::atomic<int32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> turn_{0};
};

}  // namespace prequant

#endif
