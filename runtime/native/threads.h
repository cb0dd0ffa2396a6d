// Sharing work among the threads of torch.
//
// torch computes on the threads of the libgomp.so.1 that it brings along. The kernels call that very library, found in
// the running process: compiled OpenMP would bind to the compiler's own runtime (clang's is another), and two pools of
// threads in one process fight for the same cores. Where there is none, one thread does all the work.

#ifndef PREQUANT_THREADS_H
#define PREQUANT_THREADS_H

#include <stdint.h>

namespace prequant {

// Call work(context, part) for every part in [0, parts), on up to as many threads at once; returns when all are done.
void run_parts(int32_t parts, void (*work)(void *context, int32_t part), void *context);

// Call work(context, member, members) once on each of up to `members` threads; members is how many there are.
void run_team(int32_t members, void (*work)(void *context, int32_t member, int32_t members), void *context);

// The same for a function object.
template <class Work> void with_team(int32_t members, Work work) {
    run_team(
        members,
        [](void *context, int32_t member, int32_t count) { (*static_cast<Work *>(context))(member, count); }, &work);
}

// run_parts for a function object.
template <class Work> void parallel(int32_t parts, Work work) {
    run_parts(parts, [](void *context, int32_t part) { (*static_cast<Work *>(context))(part); }, &work);
}

}  // namespace prequant

#endif
