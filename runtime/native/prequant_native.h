// The C interface of libprequant_native: plain C types only, so that any language can call it and no version of Python
// or torch is built in. Nothing behind it allocates, throws or starts threads.

#ifndef PREQUANT_NATIVE_H
#define PREQUANT_NATIVE_H

#include <stdint.h>

#if defined(_WIN32)
#define PREQUANT_API __declspec(dllexport)
#else
#define PREQUANT_API __attribute__((visibility("default")))
#endif

// Raised by one with every change that would break a caller of the functions below: a signature, a layout, a meaning.
// runtime/native.py holds the number that it was written for and refuses any other.
#define PREQUANT_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

// The ABI version that the library was built with.
PREQUANT_API int32_t prequant_abi_version(void);

// The widest instruction set that this processor *and* its operating system let this process use, as a static string:
//   "scalar"      plain C++, any processor
//   "avx2"        AVX2, FMA, F16C
//   "avx512vnni"  the above and AVX-512 F, BW, DQ, VL, VNNI
//   "amx"         the above and AMX-TILE, AMX-INT8
// Each includes the ones before it. On Linux, AMX has to be asked for: the first call asks on behalf of the process.
PREQUANT_API const char *prequant_isa(void);

#ifdef __cplusplus
}
#endif

#endif
