// What the library says of itself and of the processor. No kernel lives here, and this unit is compiled for the
// baseline instruction set: it has to run on any processor in order to find out what the processor can do.

#include "prequant_native.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define PREQUANT_X86 1
#include <cpuid.h>
#endif

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef PREQUANT_X86

constexpr uint32_t bit(unsigned n) { return uint32_t{1} << n; }

constexpr bool has_all(uint64_t value, uint64_t wanted) { return (value & wanted) == wanted; }

// CPUID leaf 1, ECX
constexpr uint32_t kFma = bit(12), kOsXsave = bit(27), kAvx = bit(28), kF16c = bit(29);
// CPUID leaf 7, EBX
constexpr uint32_t kAvx2 = bit(5), kAvx512F = bit(16), kAvx512Dq = bit(17), kAvx512Bw = bit(30), kAvx512Vl = bit(31);
// CPUID leaf 7, ECX and EDX
constexpr uint32_t kAvx512Vnni = bit(11), kAmxBf16 = bit(22), kAmxTile = bit(24), kAmxInt8 = bit(25);
// XCR0: the registers that the operating system saves at a context switch. One it does not save must not be used.
constexpr uint64_t kYmmState = 0x06, kZmmState = 0xe6, kTileState = 0x60000;

uint64_t read_xcr0() {
    // The byte form of xgetbv: the intrinsic would need -mxsave for the whole unit.
    uint32_t low = 0, high = 0;
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
}

bool os_grants_tiles() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

const char *detect() {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has_all(ecx, kOsXsave | kAvx | kFma | kF16c)) {
        return "scalar";
    }
    const uint64_t saved = read_xcr0();
    if (!has_all(saved, kYmmState) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !has_all(ebx, kAvx2)) {
        return "scalar";
    }
    if (!has_all(saved, kZmmState) || !has_all(ebx, kAvx512F | kAvx512Dq | kAvx512Bw | kAvx512Vl) ||
        !has_all(ecx, kAvx512Vnni)) {
        return "avx2";
    }
    if (!has_all(saved, kTileState) || !has_all(edx, kAmxTile | kAmxInt8 | kAmxBf16) ||
        !os_grants_tiles()) {
        return "avx512vnni";
    }
    return "amx";
}

#else

const char *detect() { return "scalar"; }

#endif

} // namespace

extern "C" {

PREQUANT_API int32_t prequant_abi_version(void) { return PREQUANT_ABI_VERSION; }

PREQUANT_API const char *prequant_isa(void) { return detect(); }

} // extern "C"
