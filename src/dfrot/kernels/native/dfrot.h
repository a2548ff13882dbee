/* The native kernels' common ground: element types, instruction sets, scratch memory.
 *
 * Plain C11 on data pointers; knows nothing of Python or torch. Functions that compute take the instruction set to use
 * and the number of threads, and write only where they are told to. Matrices are row-major. */
#ifndef DFROT_H
#define DFROT_H

#include <stddef.h>
#include <stdint.h>

/* Instruction sets, each including those before it, but that AVX512 does without AVX-VNNI. */
enum { ISA_NONE = 0, ISA_AVX2 = 1, ISA_AVXVNNI = 2, ISA_AVX512 = 3, ISA_AMX = 4 };

/* Element types of activations and scales. */
enum { FLOAT32 = 0, BFLOAT16 = 1 };

#define TARGET_AVX2 __attribute__((target("avx2,fma,bmi2")))
#define TARGET_AVXVNNI __attribute__((target("avxvnni,avx2,fma,bmi2")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2")))
#define TARGET_AMX                                                                                                     \
    __attribute__((target("prfchw,amx-tile,amx-int8,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2")))
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

/* The best instruction set of this machine, ISA_NONE if it has none of them. Asks the system for AMX, once. */
EXPORT int dfrot_isa(void);

/* Whether this machine has an instruction set. */
EXPORT int dfrot_has(int isa);

/* At least `bytes` of memory, aligned to 64, that belong to the calling thread until its next call with the same slot;
 * NULL if there is none. */
enum { SLOT_CODES, SLOT_TILES, SLOT_ROW, SLOT_HIDDEN, SLOT_BLOCK, SLOT_PARTS, SLOTS };
void *scratch(int slot, size_t bytes);

/* How rows of activations become integers: `bits` 2 to 8, range times `clip`. */
typedef struct {
    int bits, symmetric;
    float clip;
} grid_t;

/* Codes come in blocks of as many inputs. */
#define BLOCK 128

/* Quantized rows. A code is what the grid's integer exceeds the zero point by, if that fits a byte: up to 7 bits, and 8
 * bits symmetric; else the integer less 128, and `zero` is the zero point less 128 (0 otherwise).
 *
 * codes (rows, stride), 0 beyond the inputs; `paired`: in each block, first the even inputs, then the odd ones, which
 * is how 4-bit weights come out of their bytes. scale, zero (rows); sums of codes by group (rows, groups). */
typedef struct {
    int8_t *codes;
    int64_t stride;
    int paired;
    float *scale;
    int32_t *zero, *sums;
    int64_t group, groups;
    int largest; /* size that a code may have */
} codes_t;

/* Vectors of the compiler, which any instruction set can compute. */
#define LANES 16
typedef float lanes_t __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
#define LOAD(from) (*(const lanes_t *)(from))
#define STORE(to, lanes) (*(lanes_t *)(to) = (lanes))

INLINE int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

INLINE int64_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE float to_float(const void *x, int dtype, int64_t i) {
    if (dtype == FLOAT32) return ((const float *)x)[i];
    union {
        uint32_t bits;
        float value;
    } wide = {(uint32_t)((const uint16_t *)x)[i] << 16};
    return wide.value;
}

/* Rounds to nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bfloat16(float value) {
    union {
        float value;
        uint32_t bits;
    } wide = {value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16);
}

/* eˣ to 2 · 10⁻⁷ relative (Cephes' polynomial), between e⁻⁸⁷ and e⁸⁸; NaN stays NaN. */
INLINE float exp_float(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p, r * r, r + 1);
    union {
        int32_t bits;
        float value;
    } power = {((int32_t)n + 127) << 23};
    return p * power.value;
}

/* eˣ to 3 · 10⁻¹⁶ relative (Cephes' rational function), between e⁻⁷⁰⁰ and e⁷⁰⁰; NaN stays NaN. */
INLINE double exp_double(double x) {
    x = x < -700.0 ? -700.0 : x > 700.0 ? 700.0 : x;
    double n = __builtin_rint(x * 1.4426950408889634073599);
    double r = x - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6, s = r * r;
    double p = r * ((1.26177193074810590878e-4 * s + 3.02994407707441961300e-2) * s + 9.99999999999999999910e-1);
    double q = ((3.00198505138664455042e-6 * s + 2.52448340349684104192e-3) * s + 2.27265548208155028766e-1) * s + 2.0;
    union {
        int64_t bits;
        double value;
    } power = {((int64_t)n + 1023) << 52};
    return (1 + 2 * p / (q - p)) * power.value;
}

/* A pass over a row x of n entries, seen as (…, size, after).
 *
 * BUTTERFLIES multiplies the middle axis by Sylvester's Hadamard matrix, entries ±1; `size` is a power of two.
 * DENSE multiplies it by the matrix `data`, float (size, size).
 * PERMUTE takes y[j] = x[data[j]], int32.
 * SUBTRACT takes data[j] from what the division below makes of x[j], float. */
enum { BUTTERFLIES = 0, DENSE = 1, PERMUTE = 2, SUBTRACT = 3 };
typedef struct {
    int64_t kind, size, after;
    const void *data;
} pass_t;

/* Passes, one after the other, and division by the root of `square`. */
typedef struct {
    int64_t count;
    const pass_t *passes;
    float square;
} transform_t;

/* Transforms a row of n floats in place, in float64 if it comes from a stream of FLOAT32, so that the result is that of
 * the reference; `spare` has room for 2 n. Nothing happens if `transform` is NULL or empty. */
void transform_row(int isa, int dtype, float *x, double *spare, int64_t n, const transform_t *transform);

/* The smallest bfloat16 that is not below a scale. */
INLINE uint16_t round_up(float scale) {
    uint16_t narrow = to_bfloat16(scale);
    return to_float(&narrow, BFLOAT16, 0) < scale ? narrow + 1 : narrow;
}

/* What quantizing leaves of n floats. */
void fake_quantize_row(float *x, int64_t n, grid_t grid);

/* A row of `in` floats into row `to` of `out`. */
void quantize_row(int isa, const float *x, int64_t in, grid_t grid, codes_t out, int64_t to);

#endif
