#include "threads.h"

#include "team.h"

#if defined(__unix__)
#include <dlfcn.h>
#include <sched.h>
#endif

namespace {

// libgomp's entry points: a team of threads that each call a function, and who they are in it.
struct Gomp {
    void (*parallel)(void (*function)(void *), void *data, unsigned threads, unsigned flags) = nullptr;
    int (*thread_number)() = nullptr;
    int (*thread_count)() = nullptr;

    Gomp() {
#if defined(__unix__)
        void *library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_NOLOAD);
        if (!library) return;
        thread_number = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
        thread_count = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads"));
        if (thread_number && thread_count) {
            parallel = reinterpret_cast<decltype(parallel)>(dlsym(library, "GOMP_parallel"));
        }
#endif
    }
};

const Gomp &gomp() {
    static const Gomp found;
    return found;
}

struct Team {
    void (*work)(void *, int32_t, int32_t);
    void *context;
};

void run_member(void *data) {
    const Team &team = *static_cast<const Team *>(data);
    team.work(team.context, gomp().thread_number(), gomp().thread_count());
}

constexpr uint32_t kLooks = 4096;  // far longer than a step takes

}  // namespace

namespace prequant {

void Barrier::pause(uint32_t looked) {
#if defined(__unix__)
    if (looked >= kLooks) {
        sched_yield();
        return;
    }
#endif
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#else
    static_cast<void>(looked);
#endif
}

void run_team(int32_t members, void (*work)(void *, int32_t, int32_t), void *context) {
    if (members > 1 && gomp().parallel) {
        Team team{work, context};
        gomp().parallel(run_member, &team, static_cast<unsigned>(members), 0);
        return;
    }
    work(context, 0, 1);
}

void run_parts(int32_t parts, void (*work)(void *, int32_t), void *context) {
    with_team(parts, [&](int32_t member, int32_t members) {
        // Inside another team, or where threads are limited, there may be fewer members than parts.
        for (int32_t part = member; part < parts; part += members) work(context, part);
    });
}

}  // namespace prequant
