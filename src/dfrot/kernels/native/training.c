/* What training computes around its products: scales and biases of what they put out, and how far a student's next-token
 * distributions are from a teacher's. Each is one pass over memory. */
#include "dfrot.h"

#include <math.h>

INLINE void scale_body(const void *x, int dtype, int64_t n, const float *scale, const float *bias, void *out, int made) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float value = to_float(x, dtype, j) * scale[j] + (bias ? bias[j] : 0);
        if (made == FLOAT32)
            ((float *)out)[j] = value;
        else
            ((uint16_t *)out)[j] = to_bfloat16(value);
    }
}

#define SCALE(NAME, TARGET)                                                                                            \
    TARGET static void NAME(const void *x, int dtype, int64_t n, const float *scale, const float *bias, void *out,     \
                            int made) {                                                                                \
        if (dtype == FLOAT32 && made == FLOAT32) scale_body(x, FLOAT32, n, scale, bias, out, FLOAT32);                 \
        if (dtype == FLOAT32 && made != FLOAT32) scale_body(x, FLOAT32, n, scale, bias, out, BFLOAT16);                \
        if (dtype != FLOAT32 && made == FLOAT32) scale_body(x, BFLOAT16, n, scale, bias, out, FLOAT32);                \
        if (dtype != FLOAT32 && made != FLOAT32) scale_body(x, BFLOAT16, n, scale, bias, out, BFLOAT16);               \
    }
SCALE(scale_avx512, TARGET_AVX512)
SCALE(scale_avx2, TARGET_AVX2)

/* x · scale + bias of `rows` rows of n entries, each with a scale and, unless there is none, a bias; `out` of type `made`. */
EXPORT void dfrot_scale(int isa, int threads, const void *x, int dtype, int64_t rows, int64_t n, const float *scale,
                        const float *bias, void *out, int made) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++)
        (isa >= ISA_AVX512 ? scale_avx512 : scale_avx2)((const char *)x + i * n * size_of(dtype), dtype, n, scale, bias,
                                                        (char *)out + i * n * size_of(made), made);
}

#define PIECE 2048 /* logits that are summed in float32; their sums are added in float64 */

typedef struct {
    float most;
    double logarithm; /* of Σ e^logit */
} partition_t;

INLINE partition_t partition(const void *x, int dtype, int64_t n) {
    float most = to_float(x, dtype, 0);
    double whole = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < n; j++) most = to_float(x, dtype, j) > most ? to_float(x, dtype, j) : most;
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t stop = start + PIECE < n ? start + PIECE : n;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = start; j < stop; j++) sum += exp_float(to_float(x, dtype, j) - most);
        whole += sum;
    }
    return (partition_t){most, log(whole)};
}

/* KL(teacher ‖ student) of a row. With `slopes`, share · (softmax(student) − softmax(teacher)) takes the place of the
 * student's logits. */
INLINE double body(void *student, const void *teacher, int dtype, int64_t n, int slopes, float share) {
    partition_t own = partition(student, dtype, n), goal = partition(teacher, dtype, n);
    float own_log = (float)own.logarithm, goal_log = (float)goal.logarithm;
    double whole = 0;
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t stop = start + PIECE < n ? start + PIECE : n;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = start; j < stop; j++) {
            float q = to_float(student, dtype, j) - own.most - own_log, p = to_float(teacher, dtype, j) - goal.most - goal_log;
            float chance = exp_float(p);
            sum += chance * (p - q);
            if (slopes && dtype == FLOAT32) ((float *)student)[j] = share * (exp_float(q) - chance);
            if (slopes && dtype != FLOAT32) ((uint16_t *)student)[j] = to_bfloat16(share * (exp_float(q) - chance));
        }
        whole += sum;
    }
    return whole;
}

#define DIVERGENCE(NAME, TARGET)                                                                                       \
    TARGET static double NAME(void *student, const void *teacher, int dtype, int64_t n, int slopes, float share) {     \
        if (dtype == FLOAT32)                                                                                          \
            return slopes ? body(student, teacher, FLOAT32, n, 1, share) : body(student, teacher, FLOAT32, n, 0, 0);   \
        return slopes ? body(student, teacher, BFLOAT16, n, 1, share) : body(student, teacher, BFLOAT16, n, 0, 0);     \
    }
DIVERGENCE(divergence_avx512, TARGET_AVX512)
DIVERGENCE(divergence_avx2, TARGET_AVX2)

/* The same of `rows` rows of n logits, which stay in the cache between the three loops over them; `found` (rows). */
EXPORT void dfrot_divergence(int isa, int threads, void *student, const void *teacher, int dtype, int64_t rows, int64_t n,
                             int slopes, float share, double *found) {
    int64_t row = n * size_of(dtype);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++)
        found[i] = (isa >= ISA_AVX512 ? divergence_avx512 : divergence_avx2)((char *)student + i * row,
                                                                             (const char *)teacher + i * row, dtype, n, slopes,
                                                                             share);
}
