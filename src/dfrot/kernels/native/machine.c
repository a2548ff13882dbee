#include "dfrot.h"

#include <cpuid.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

/* Linux lets a process use AMX's tiles only after it has asked. */
static int may_use_tiles(void) {
#ifdef __linux__
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

static int has_amx(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1)) return 0; /* AMX-BF16, AMX-TILE, AMX-INT8 */
    return __builtin_cpu_supports("avx512bf16") && may_use_tiles();
}

static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

int dfrot_has(int isa) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    int avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    switch (isa) {
        case ISA_AVX2: return avx2;
        case ISA_AVXVNNI: return avx2 && has_avxvnni();
        case ISA_AVX512: return avx512;
        case ISA_AMX: return avx512 && has_amx();
        default: return isa == ISA_NONE;
    }
}

int dfrot_isa(void) {
    static int found = -1;
    for (int isa = ISA_AMX; found < 0; isa--)
        if (dfrot_has(isa)) found = isa;
    return found;
}

void *scratch(int slot, size_t bytes) {
    static _Thread_local struct {
        void *memory;
        size_t bytes;
    } kept[SLOTS];
    if (kept[slot].bytes < bytes) {
        free(kept[slot].memory);
        bytes = (bytes + 4095) & ~(size_t)4095;
        kept[slot].memory = aligned_alloc(64, bytes);
        kept[slot].bytes = kept[slot].memory ? bytes : 0;
    }
    return kept[slot].memory;
}
