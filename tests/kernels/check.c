/* The kernels on exactly allocated memory, for the sanitizers to watch, against plain loops. Prints the first mistake. */
#include "attention.h"
#include "linear.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int dfrot_linear(int isa, int threads, const void *x, int dtype, int64_t rows, const transform_t *transform,
                 const grid_t *grid, int count, const weights_t *weights, void **y);
int dfrot_rotate(int isa, int threads, const void *x, void *y, int dtype, int64_t rows, int64_t n,
                 const transform_t *transform);
extern int dfrot_pairs;
void dfrot_code_sums(const uint8_t *codes, int64_t out, int64_t in, int bits, int64_t group, int32_t *sums);
void dfrot_append(int isa, int threads, const void *x, int dtype, int64_t batch, int64_t tokens, int64_t from,
                  const transform_t *transform, float clip, const cache_t *cache);
void dfrot_unpack_cache(int threads, const cache_t *cache, int64_t batch, int64_t tokens, void *to, int dtype);
int dfrot_attend(int isa, int threads, const void *q, int dtype, int64_t batch, int64_t heads, int64_t tokens,
                 int64_t length, const transform_t *transform, double scaling, const uint8_t *mask, int64_t mask_batch,
                 int64_t mask_stride, const double *more, const cache_t *keys, const cache_t *values, void *y);

void dfrot_quantize_backward(int isa, int threads, const float *x, const float *upstream, int64_t rows, int64_t n,
                             const grid_t *grid, float *out, float *of_clip);
void dfrot_fake_quantize(int isa, int threads, const float *x, int64_t rows, int64_t n, const grid_t *grid, int narrow,
                         float *out);
void dfrot_scale(int isa, int threads, const void *x, int dtype, int64_t rows, int64_t n, const float *scale,
                 const float *bias, void *out, int made);
void dfrot_divergence(int isa, int threads, void *student, const void *teacher, int dtype, int64_t rows, int64_t n,
                      int slopes, float share, double *found);
void dfrot_clip_errors(int isa, int threads, const float *x, int64_t rows, int64_t n, const float *scale, const float *zero,
                       int64_t clips, float lowest, float highest, double *errors);
void dfrot_round_columns(int isa, int threads, float *wanted, float *error, float *codes, const float *taken,
                         const int64_t *group, const float *scale, const float *zero, int64_t out, int64_t columns,
                         float lowest, float highest);

static uint64_t state = 1;
static float uniform(void) { /* −1 … 1 */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(state >> 32) / 2147483648.0f;
}

static void *exact(size_t bytes) {
    void *memory = malloc(bytes);
    if (!memory) abort();
    return memory;
}

static float *random_floats(int64_t n) {
    float *x = exact((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = uniform();
    return x;
}

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) printf(__VA_ARGS__), exit(1);                                                                \
    } while (0)

static weights_t random_weights(int64_t out, int64_t in, int bits, int64_t group, int symmetric) {
    int64_t bytes = in * bits / 8, groups = in / group;
    uint8_t *codes = exact((size_t)(out * bytes)), *zero = exact((size_t)(out * groups));
    uint16_t *scale = exact((size_t)(out * groups) * 2);
    int32_t *sums = exact((size_t)(out * groups) * 4);
    for (int64_t i = 0; i < out * bytes; i++) codes[i] = (uint8_t)(int)(127.5f + 127.5f * uniform());
    for (int64_t i = 0; i < out * groups; i++) {
        zero[i] = (uint8_t)(int)((float)((1 << bits) - 1) * (0.5f + 0.5f * uniform()));
        scale[i] = to_bfloat16(0.6f + 0.5f * uniform());
    }
    if (bits == 4 || bits == 8) dfrot_code_sums(codes, out, in, bits, group, sums);
    if (symmetric) free(zero), zero = NULL;
    return (weights_t){out, in, group, groups, bits, codes, bytes, scale, BFLOAT16, zero, sums, random_floats(out)};
}

static void free_weights(weights_t *w) {
    free((void *)w->codes), free((void *)w->scale), free((void *)w->zero), free((void *)w->sums), free((void *)w->bias);
}

static double weight_at(const weights_t *w, int64_t n, int64_t k) {
    uint8_t byte = w->codes[n * w->bytes + k * w->bits / 8];
    int code = w->bits == 8 ? byte : k % 2 ? byte >> 4 : byte & 15;
    if (w->bits != 4 && w->bits != 8) {
        code = 0;
        for (int64_t bit = 0, at = k * w->bits; bit < w->bits; bit++, at++)
            code |= (w->codes[n * w->bytes + at / 8] >> at % 8 & 1) << bit;
    }
    int64_t at = n * w->groups + k / w->group;
    return to_float(w->scale, BFLOAT16, at) * (double)(code - (w->zero ? w->zero[at] : 1 << (w->bits - 1)));
}

static void check_linear(int isa, int64_t rows, int64_t in, int64_t out, int bits, int64_t group, int symmetric) {
    weights_t w = random_weights(out, in, bits, group, symmetric);
    grid_t grid = {symmetric ? 8 : 4, symmetric, 0.9f};
    float *x = random_floats(rows * in), *y = exact((size_t)(rows * out) * 4), *q = exact((size_t)in * 4);
    transform_t none = {0, NULL, 1};
    CHECK(dfrot_linear(isa, 2, x, FLOAT32, rows, &none, &grid, 1, &w, (void **)&y) == 0, "linear: no memory\n");
    for (int64_t m = 0; m < rows; m++) {
        memcpy(q, x + m * in, (size_t)in * 4);
        fake_quantize_row(q, in, grid);
        for (int64_t n = 0; n < out; n++) {
            double sum = w.bias[n], size = fabs(w.bias[n]);
            for (int64_t k = 0; k < in; k++) sum += q[k] * weight_at(&w, n, k), size += fabs(q[k] * weight_at(&w, n, k));
            CHECK(fabs(sum - y[m * out + n]) <= 1e-5 * size, "linear: isa %d, %ld x %ld x %ld, %d bits, group %ld: %g, not %g\n",
                  isa, (long)rows, (long)in, (long)out, bits, (long)group, y[m * out + n], sum);
        }
    }
    free_weights(&w), free(x), free(y), free(q);
}

/* Rows that are not quantized, in streams of both element types. */
static void check_floats(int isa, int64_t rows, int64_t in, int64_t out, int bits, int64_t group, int symmetric) {
    weights_t w = random_weights(out, in, bits, group, symmetric);
    grid_t grid = {16, 1, 1};
    transform_t none = {0, NULL, 1};
    double *dense = exact((size_t)(out * in) * sizeof *dense);
    for (int64_t i = 0; i < out * in; i++) dense[i] = weight_at(&w, i / in, i % in);
    for (int dtype = FLOAT32; dtype <= BFLOAT16; dtype++) {
        float *x = random_floats(rows * in);
        uint16_t *narrow = exact((size_t)(rows * in) * 2);
        for (int64_t i = 0; i < rows * in; i++)
            if (dtype == BFLOAT16) narrow[i] = to_bfloat16(x[i]), x[i] = to_float(narrow, BFLOAT16, i);
        void *y = exact((size_t)(rows * out * size_of(dtype))), *from = dtype == FLOAT32 ? (void *)x : narrow;
        CHECK(dfrot_linear(isa, 2, from, dtype, rows, &none, &grid, 1, &w, &y) == 0, "floats: no memory\n");
        for (int64_t m = 0; m < rows; m++)
            for (int64_t n = 0; n < out; n++) {
                double sum = w.bias[n], size = fabs(w.bias[n]), got = to_float(y, dtype, m * out + n);
                for (int64_t k = 0; k < in; k++)
                    sum += x[m * in + k] * dense[n * in + k], size += fabs(x[m * in + k] * dense[n * in + k]);
                CHECK(fabs(sum - got) <= (dtype == FLOAT32 ? 1e-5 : 0x1p-7) * size,
                      "floats: isa %d, type %d, %ld x %ld x %ld, %d bits, group %ld: %g, not %g\n", isa, dtype, (long)rows,
                      (long)in, (long)out, bits, (long)group, got, sum);
            }
        free(x), free(narrow), free(y);
    }
    free_weights(&w), free(dense);
}

/* Only where they write, and sizes: tests/kernels/test_training.py has the values. */
static void check_backward(int isa, int64_t n, int symmetric) {
    float *x = random_floats(3 * n), *upstream = random_floats(3 * n), *out = exact((size_t)(3 * n) * 4);
    float *of_clip = exact(3 * sizeof *of_clip);
    grid_t grid = {4, symmetric, 0.9f};
    dfrot_quantize_backward(isa, 2, x, upstream, 3, n, &grid, out, of_clip);
    for (int64_t i = 0; i < 3; i++) {
        double sum = 0;
        int64_t passed = 0;
        for (int64_t j = 0; j < n; j++) passed += out[i * n + j] == upstream[i * n + j], sum += fabs(upstream[i * n + j]);
        CHECK(passed >= n / 2 - 2 && fabs(of_clip[i]) <= sum, "backward: isa %d, %ld entries\n", isa, (long)n);
    }
    dfrot_fake_quantize(isa, 2, x, 3, n, &grid, symmetric, out);
    for (int64_t i = 0; i < 3 * n; i++)
        CHECK(fabs(out[i] - x[i]) < 3, "fake quantize: isa %d, %ld entries\n", isa, (long)n);
    free(x), free(upstream), free(out), free(of_clip);
}

static void check_training(int isa, int64_t n) {
    float *x = random_floats(3 * n), *y = random_floats(3 * n), *scale = random_floats(n), *out = exact((size_t)(3 * n) * 4);
    double *found = exact(3 * sizeof *found);
    dfrot_scale(isa, 2, x, FLOAT32, 3, n, scale, scale, out, FLOAT32);
    dfrot_scale(isa, 2, x, BFLOAT16, 3, n, scale, NULL, out, BFLOAT16);
    dfrot_scale(isa, 2, x, FLOAT32, 3, n, scale, NULL, out, FLOAT32);
    for (int64_t i = 0; i < 3 * n; i++)
        CHECK(out[i] == x[i] * scale[i % n], "scale: isa %d, %ld entries\n", isa, (long)n);
    dfrot_divergence(isa, 2, x, y, FLOAT32, 3, n, 1, 1.0f, found);
    for (int64_t i = 0; i < 3; i++) {
        double sum = 0;
        for (int64_t j = 0; j < n; j++) sum += x[i * n + j];
        CHECK(found[i] > -1e-5 && fabs(sum) < 1e-5, "divergence: isa %d, %ld entries\n", isa, (long)n);
    }
    free(x), free(y), free(scale), free(out), free(found);
}

static void check_rounding(int isa, int64_t n) {
    float *x = random_floats(3 * n), *scale = exact(6 * sizeof *scale);
    double *errors = exact(6 * sizeof *errors);
    for (int i = 0; i < 6; i++) scale[i] = i < 3 ? 1 : 0.01f; /* with steps of 1 nothing of −1 … 1 is off by more than 1/2 */
    dfrot_clip_errors(isa, 2, x, 3, n, scale, NULL, 2, -8, 7, errors);
    for (int i = 0; i < 3; i++)
        CHECK(errors[i] >= 0 && errors[i] < 0.2 * n && errors[i + 3] < n, "clip: isa %d, %ld entries\n", isa, (long)n);
    dfrot_clip_errors(isa, 2, x, 3, n, scale, scale, 2, 0, 15, errors);
    float *wanted = random_floats(2 * n), *error = exact((size_t)(2 * n) * 4), *codes = exact((size_t)(2 * n) * 4);
    float *steps = exact((size_t)n * 4), taken[] = {0, 1, 0, 0};
    int64_t group[] = {0, 0};
    memcpy(error, wanted, (size_t)(2 * n) * 4);
    for (int64_t i = 0; i < n; i++) steps[i] = 0.25f;
    dfrot_round_columns(isa, 2, wanted, error, codes, taken, group, steps, NULL, n, 2, -8, 7);
    for (int64_t i = 0; i < 2 * n; i++)
        CHECK(fabs(error[i]) < 0.26 && codes[i] == rintf(codes[i]), "columns: isa %d, %ld entries\n", isa, (long)n);
    dfrot_round_columns(isa, 2, wanted, error, codes, taken, group, steps, steps, n, 2, 0, 15);
    free(x), free(scale), free(errors), free(wanted), free(error), free(codes), free(steps);
}

static void check_rotate(int isa) {
    enum { N = 96 };
    float *matrix = random_floats(12 * 12), *x = random_floats(3 * N), *y = exact(3 * N * sizeof *y);
    float *offset = random_floats(N);
    int32_t *order = exact(N * sizeof *order);
    for (int i = 0; i < N; i++) order[i] = (i * 5 + 3) % N;
    pass_t passes[] = {{PERMUTE, N, 1, order}, {DENSE, 12, 8, matrix}, {BUTTERFLIES, 8, 1, NULL}, {DENSE, 12, 1, matrix},
                       {SUBTRACT, N, 1, offset}};
    transform_t transform = {5, passes, 4};
    CHECK(dfrot_rotate(isa, 2, x, y, FLOAT32, 3, N, &transform) == 0, "rotate: no memory\n");
    for (int row = 0; row < 3; row++) {
        double a[N], b[N] = {0}, c[N] = {0};
        for (int i = 0; i < N; i++) a[i] = x[row * N + order[i]];
        for (int i = 0; i < N; i++)
            for (int j = 0; j < 12; j++) b[j * 8 + i % 8] += a[i] * matrix[i / 8 * 12 + j];
        for (int i = 0; i < N; i++)
            for (int j = 0; j < 8; j++) c[i / 8 * 8 + j] += b[i] * (__builtin_parity((unsigned)(i % 8 & j)) ? -1 : 1);
        for (int i = 0; i < N; i++) {
            double sum = 0;
            for (int k = 0; k < 12; k++) sum += c[i / 12 * 12 + k] * matrix[k * 12 + i % 12];
            sum = sum / 2 - offset[i];
            CHECK(fabs(sum - y[row * N + i]) < 1e-3, "rotate: isa %d, entry %d: %g, not %g\n", isa, i, y[row * N + i], sum);
        }
    }
    free(matrix), free(x), free(y), free(order), free(offset);
}

static cache_t new_cache(int64_t batch, int64_t heads, int64_t capacity, int64_t dim, int bits) {
    int64_t tokens = batch * heads * capacity;
    cache_t cache = {exact((size_t)(tokens * dim * bits / 8)), exact((size_t)tokens * 2), exact((size_t)tokens), heads,
                     capacity, dim, bits};
    return cache;
}

static void check_attention(int isa, int bits, int64_t dim, int64_t length, int64_t tokens) {
    enum { BATCH = 2, KV_HEADS = 2, HEADS = 6 };
    cache_t keys = new_cache(BATCH, KV_HEADS, length, dim, bits), values = new_cache(BATCH, KV_HEADS, length, dim, bits);
    transform_t none = {0, NULL, 1};
    int64_t entries = BATCH * KV_HEADS * length * dim;
    float *k = random_floats(entries), *v = random_floats(entries), *q = random_floats(BATCH * HEADS * tokens * dim);
    float *y = exact((size_t)(BATCH * HEADS * tokens * dim) * 4);
    dfrot_append(isa, 2, k, FLOAT32, BATCH, length, 0, &none, 0.95f, &keys);
    dfrot_append(isa, 2, v, FLOAT32, BATCH, length, 0, &none, 0.95f, &values);
    dfrot_unpack_cache(2, &keys, BATCH, length, k, FLOAT32);
    dfrot_unpack_cache(2, &values, BATCH, length, v, FLOAT32);
    uint8_t *mask = exact((size_t)(BATCH * tokens * length));
    for (int64_t i = 0; i < BATCH * tokens * length; i++) mask[i] = uniform() > -0.5f;
    double *more = exact((size_t)(BATCH * HEADS * tokens * length) * sizeof *more);
    for (int64_t i = 0; i < BATCH * HEADS * tokens * length; i++) more[i] = uniform();
    CHECK(dfrot_attend(isa, 2, q, FLOAT32, BATCH, HEADS, tokens, length, &none, 0.3, mask, tokens * length, length, more,
                       &keys, &values, y) == 0, "attend: no memory\n");
    double *p = exact((size_t)length * sizeof *p);
    for (int64_t at = 0; at < BATCH * HEADS * tokens; at++) {
        int64_t sequence = at / (HEADS * tokens), head = at / tokens % HEADS, token = at % tokens;
        int64_t group = sequence * KV_HEADS + head / (HEADS / KV_HEADS);
        double sum = 0;
        for (int64_t t = 0; t < length; t++) {
            double score = 0;
            for (int64_t j = 0; j < dim; j++) score += q[at * dim + j] * k[(group * length + t) * dim + j];
            p[t] = mask[(sequence * tokens + token) * length + t] ? exp(0.3 * score + more[at * length + t]) : 0;
            sum += p[t];
        }
        for (int64_t j = 0; j < dim; j++) {
            double mean = 0;
            for (int64_t t = 0; t < length && sum > 0; t++) mean += p[t] / sum * v[(group * length + t) * dim + j];
            double got = y[((sequence * tokens + token) * HEADS + head) * dim + j];
            CHECK(fabs(mean - got) < 1e-4, "attend: isa %d, %d bits, dim %ld: %g, not %g\n", isa, bits, (long)dim, got, mean);
        }
    }
    free(keys.codes), free(keys.scale), free(keys.zero), free(values.codes), free(values.scale), free(values.zero);
    free(k), free(v), free(q), free(y), free(mask), free(p), free(more);
}

int main(void) {
    static const int64_t rows[] = {1, 3, 8, 9, 33, 300};
    for (int isa = 1; isa <= dfrot_isa(); isa++) {
        if (!dfrot_has(isa)) continue;
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            check_linear(isa, rows[i], 2, 1, 4, 2, 0);
            check_linear(isa, rows[i], 70, 33, 4, 70, 1);
            check_linear(isa, rows[i], 200, 40, 8, 200, 0);
            check_linear(isa, rows[i], 256, 31, 4, 64, 0);
            check_linear(isa, rows[i], 256, 65, 8, 128, 1);
            if (isa >= ISA_AVX512) check_linear(isa, rows[i], 96, 17, 4, 16, 0);
            for (dfrot_pairs = 0; dfrot_pairs <= (isa == ISA_AVX512 && __builtin_cpu_supports("avx512bf16")); dfrot_pairs++) {
                if (rows[i] > 33) { /* more than a chunk */
                    check_floats(isa, rows[i], 136, 33, 4, 136, 0);
                    continue;
                }
                check_floats(isa, rows[i], 2, 1, 4, 2, 0);
                check_floats(isa, rows[i], 70, 33, 4, 70, 1);
                check_floats(isa, rows[i], 200, 40, 3, 200, 0);
                check_floats(isa, rows[i], 256, 31, 4, 64, 0);
                check_floats(isa, rows[i], 640, 65, 4, 128, 1);
                check_floats(isa, rows[i], 72, 65, 5, 8, 0);
                check_floats(isa, rows[i], 264, 30, 4, 8, 0);
                check_floats(isa, rows[i], 256, 9, 8, 256, 0);
            }
        }
        check_linear(isa, 193, 5632, 300, 4, 5632, 0); /* wider than what stays near, and more than a run */
        check_rotate(isa);
        for (int64_t n = 1; n < 40; n += 6) check_backward(isa, n, n % 4 == 1), check_training(isa, n), check_rounding(isa, n);
        check_attention(isa, 4, 32, 1, 1);
        check_attention(isa, 4, 64, 130, 2);
        check_attention(isa, 8, 128, 300, 1);
    }
    puts("ok");
    return 0;
}
