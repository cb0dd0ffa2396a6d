// Weights in the kernels' own layout (native/panels.h), made when they are first used and kept for as long as their
// tensors live and are not written to. A tensor is known by its memory, not by the object that stands for it: a package
// may make a new view of a constant in every call.

#ifndef PREQUANT_TORCH_PANELS_H
#define PREQUANT_TORCH_PANELS_H

#include <memory>

#include "checks.h"

namespace prequant_torch {

struct Panels {
    std::shared_ptr<const void> codes, scales;  // what prequant_pack_codes and prequant_pack_scales wrote
};

// Those of a weight. Threads may call it at once.
Panels panels_of(const char *op, const Weight &weight);

}  // namespace prequant_torch

#endif
