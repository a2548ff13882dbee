/* How far each of some scales moves a row: what the search for clip ratios compares. */
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
