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

// The same for a function object.
template <class Work> void parallel(int32_t parts, Work work) {
    run_parts(parts, [](void *context, int32_t part) { (*static_cast<Work *>(context))(part); }, &work);
}

}  // namespace prequant

#endif
