// How the operators refuse: with one message that names the operator.

#ifndef PREQUANT_TORCH_ERRORS_H
#define PREQUANT_TORCH_ERRORS_H

#include <c10/util/Exception.h>

// Throws c10::Error unless `condition`. Wants the operator's name as `op` in scope.
#define PREQUANT_CHECK(condition, ...) TORCH_CHECK(condition, "prequant::", op, ": ", __VA_ARGS__)

#endif
