/* What rounding weights computes: how far each of some scales moves a row, which the search for clip ratios compares, and
 * GPTQ's columns. */
#include "dfrot.h"

#include <math.h>

#define LEAST 1e-20f /* so small a squared error counts as this much, which is nothing beside others */
#define FIFTHS 0x4c2b851e /* 6/5 of 127 − 0.05 exponents: t^(-1/5) to 3 % */

/* t^1.2 to some 10⁻⁶ of it, for t from LEAST to 10¹⁰: t² z⁴ with z = t^(-1/5), which Newton's rule makes of a fifth of
 * the exponent. */
INLINE float power(float t) {
    union {
        float value;
        int32_t bits;
    } z = {t};
    z.bits = FIFTHS - (int32_t)((float)z.bits * 0.2f);
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
        float square = z.value * z.value;
        z.value *= 1.2f - 0.2f * (t * square) * (square * z.value);
    }
    float square = z.value * z.value;
    return t * square * (t * square);
}

/* Σ |e|^2.4 of n entries, e being an error in steps of the grid. */
INLINE float body(const float *x, int64_t n, float scale, float zero, float lowest, float highest) {
    float inverse = 1 / scale, sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) {
        float steps = x[j] * inverse, code = __builtin_rintf(steps) + zero;
        code = code < lowest ? lowest : code;
        code = code > highest ? highest : code;
        float e = code - zero - steps, t = e * e;
        sum += power(t < LEAST ? LEAST : t);
    }
    return sum;
}

#define MOVED(NAME, TARGET)                                                                                            \
    TARGET static float NAME(const float *x, int64_t n, float scale, float zero, float lowest, float highest) {        \
        return body(x, n, scale, zero, lowest, highest);                                                               \
    }
MOVED(moved_avx512, TARGET_AVX512)
MOVED(moved_avx2, TARGET_AVX2)

/* Σ |ŵ − w|^2.4 of `rows` rows of n weights, with each of `clips` scales a row; scale, zero (none if NULL) and errors are
 * (clips, rows). */
EXPORT void dfrot_clip_errors(int isa, int threads, const float *x, int64_t rows, int64_t n, const float *scale,
                              const float *zero, int64_t clips, float lowest, float highest, double *errors) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < clips; c++) {
            int64_t at = c * rows + i;
            float sum = (isa >= ISA_AVX512 ? moved_avx512 : moved_avx2)(x + i * n, n, scale[at], zero ? zero[at] : 0, lowest,
                                                                        highest);
            errors[at] = sum * pow(scale[at], 2.4);
        }
}

#define OUTPUTS 128 /* of a piece of work: its columns stay in the cache */

typedef struct {
    float *wanted, *error, *codes;  /* (columns, out) */
    const float *taken;             /* (columns, columns): in row j what each column after j takes of j's error */
    const int64_t *group;           /* of each column */
    const float *scale, *zero;      /* (groups, out) */
    int64_t out, columns;
    float lowest, highest;
} columns_t;

INLINE void columns_body(const columns_t *c, int64_t from, int64_t to) {
    for (int64_t j = 0; j < c->columns; j++) {
        const float *scale = c->scale + c->group[j] * c->out, *zero = c->zero ? c->zero + c->group[j] * c->out : NULL;
        float *wanted = c->wanted + j * c->out, *error = c->error + j * c->out, *codes = c->codes + j * c->out;
#pragma omp simd
        for (int64_t n = from; n < to; n++) {
            float shift = zero ? zero[n] : 0, code = __builtin_rintf(wanted[n] / scale[n]) + shift;
            code = code < c->lowest ? c->lowest : code;
            code = code > c->highest ? c->highest : code;
            float value = (code - shift) * scale[n];
            codes[n] = code, error[n] -= value, wanted[n] -= value;
        }
        for (int64_t k = j + 1; k < c->columns; k++) {
            float taken = c->taken[j * c->columns + k], *after = c->wanted + k * c->out;
#pragma omp simd
            for (int64_t n = from; n < to; n++) after[n] += taken * error[n];
        }
    }
}

#define COLUMNS(NAME, TARGET)                                                                                          \
    TARGET static void NAME(const columns_t *c, int64_t from, int64_t to) { columns_body(c, from, to); }
COLUMNS(columns_avx512, TARGET_AVX512)
COLUMNS(columns_avx2, TARGET_AVX2)

/* Round columns one after the other into `codes`; each changes what is wanted of those after it. `wanted` becomes what was
 * wanted less ŵ, `error` w less ŵ. */
EXPORT void dfrot_round_columns(int isa, int threads, float *wanted, float *error, float *codes, const float *taken,
                                const int64_t *group, const float *scale, const float *zero, int64_t out, int64_t columns,
                                float lowest, float highest) {
    columns_t c = {wanted, error, codes, taken, group, scale, zero, out, columns, lowest, highest};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t from = 0; from < out; from += OUTPUTS)
        (isa >= ISA_AVX512 ? columns_avx512 : columns_avx2)(&c, from, from + OUTPUTS < out ? from + OUTPUTS : out);
}
