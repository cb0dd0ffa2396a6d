#include "threads.h"

#if defined(__unix__)
#include <dlfcn.h>
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
    int32_t parts;
    void (*work)(void *, int32_t);
    void *context;
};

void run_member(void *data) {
    const Team &team = *static_cast<const Team *>(data);
    // Inside another team, or where threads are limited, there may be fewer than were asked for.
    const int count = gomp().thread_count();
    for (int32_t part = gomp().thread_number(); part < team.parts; part += count) team.work(team.context, part);
}

}  // namespace

namespace prequant {

void run_parts(int32_t parts, void (*work)(void *, int32_t), void *context) {
    if (parts > 1 && gomp().parallel) {
        Team team{parts, work, context};
        gomp().parallel(run_member, &team, static_cast<unsigned>(parts), 0);
        return;
    }
    for (int32_t part = 0; part < parts; ++part) work(context, part);
}

}  // namespace prequant
