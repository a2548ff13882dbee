/* Online rotations of rows, as a sequence of passes; see transform_t. In float32, or in float64, plainer and slower. */
#include "dfrot.h"

#include <math.h>
#include <string.h>

#pragma GCC optimize("fp-contract=fast") /* here a product and a sum may be rounded together */

/* Lanes that are 1, 2, 4, 8 apart become u + v and u − v. */
INLINE void lane_butterflies(float *at) {
    typedef int32_t index_t __attribute__((vector_size(LANES * sizeof(int32_t))));
    lanes_t x = LOAD(at);
    const index_t lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int half = 1; half < LANES; half *= 2) {
        index_t second = (lane & half) != 0; /* −1 where it is */
        x = __builtin_shuffle(x, lane ^ half) + __builtin_convertvector(2 * second + 1, lanes_t) * x;
    }
    STORE(at, x);
}

/* Entries u and v that are `after`, 2 after, … size / 2 after apart become u + v and u − v. */
INLINE void butterflies(float *x, int64_t n, int64_t size, int64_t after) {
    for (const float *end = x + n; x < end; x += size * after) { /* what stays in the nearest cache */
        int64_t nearest = after;
        if (after == 1 && size >= LANES) {
            for (int64_t l = 0; l < size; l += LANES) lane_butterflies(x + l);
            nearest = LANES;
        }
        for (int64_t half = nearest; half < size * after; half *= 2)
            for (int64_t start = 0; start < size * after; start += 2 * half) {
                int64_t l = start;
                for (; l + LANES <= start + half; l += LANES) {
                    lanes_t u = LOAD(x + l), v = LOAD(x + l + half);
                    STORE(x + l, u + v);
                    STORE(x + l + half, u - v);
                }
                for (; l < start + half; l++) {
                    float u = x[l], v = x[l + half];
                    x[l] = u + v, x[l + half] = u - v;
                }
            }
    }
}

/* `vectors` · LANES neighbouring columns of x matrix, from column `from` on, for one row of `size` entries. */
INLINE void dense_columns(int vectors, const float *x, float *y, int64_t size, const float *matrix, int64_t from) {
    lanes_t sums[4] = {{0}};
    for (int64_t i = 0; i < size; i++)
        for (int v = 0; v < vectors; v++) sums[v] += x[i] * LOAD(matrix + i * size + from + v * LANES);
    for (int v = 0; v < vectors; v++) STORE(y + from + v * LANES, sums[v]);
}

/* y = x matrix for a row of `size` entries. */
INLINE void dense_row(const float *x, float *y, int64_t size, const float *matrix) {
    int64_t from = 0;
    for (; from + 4 * LANES <= size; from += 4 * LANES) dense_columns(4, x, y, size, matrix, from);
    switch ((size - from) / LANES) {
        case 3: dense_columns(3, x, y, size, matrix, from), from += 3 * LANES; break;
        case 2: dense_columns(2, x, y, size, matrix, from), from += 2 * LANES; break;
        case 1: dense_columns(1, x, y, size, matrix, from), from += LANES; break;
    }
    for (; from < size; from++) {
        float sum = 0;
        for (int64_t i = 0; i < size; i++) sum += x[i] * matrix[i * size + from];
        y[from] = sum;
    }
}

/* y[j, l] = Σ_i x[i, l] matrix[i, j] for LANES neighbouring l, of x of shape (size, after). */
INLINE void dense_lanes(const float *x, float *y, int64_t size, int64_t after, const float *matrix) {
    int64_t j = 0;
    for (; j + 4 <= size; j += 4) { /* four columns share the loads of x */
        lanes_t sums[4] = {{0}};
        for (int64_t i = 0; i < size; i++) {
            lanes_t lanes = LOAD(x + i * after);
            for (int c = 0; c < 4; c++) sums[c] += matrix[i * size + j + c] * lanes;
        }
        for (int c = 0; c < 4; c++) STORE(y + (j + c) * after, sums[c]);
    }
    for (; j < size; j++) {
        lanes_t sum = {0};
        for (int64_t i = 0; i < size; i++) sum += matrix[i * size + j] * LOAD(x + i * after);
        STORE(y + j * after, sum);
    }
}

/* y[b, j, l] = Σ_i x[b, i, l] matrix[i, j] for x of shape (…, size, after). */
INLINE void dense(const float *x, float *y, int64_t n, int64_t size, int64_t after, const float *matrix) {
    for (int64_t start = 0; start < n; start += size * after) {
        if (after == 1) {
            dense_row(x + start, y + start, size, matrix);
            continue;
        }
        int64_t from = 0;
        for (; from + LANES <= after; from += LANES) dense_lanes(x + start + from, y + start + from, size, after, matrix);
        for (; from < after; from++)
            for (int64_t j = 0; j < size; j++) {
                float sum = 0;
                for (int64_t i = 0; i < size; i++) sum += matrix[i * size + j] * x[start + i * after + from];
                y[start + j * after + from] = sum;
            }
    }
}

INLINE void body(float *x, float *spare, int64_t n, const transform_t *transform) {
    float *at = x;
    for (int64_t number = 0; number < transform->count; number++) {
        const pass_t *pass = transform->passes + number;
        if (pass->kind == BUTTERFLIES) {
            butterflies(at, n, pass->size, pass->after);
            continue;
        }
        float *to = at == x ? spare : x;
        if (pass->kind == DENSE)
            dense(at, to, n, pass->size, pass->after, pass->data);
        else
            for (int64_t j = 0; j < n; j++) to[j] = at[((const int32_t *)pass->data)[j]];
        at = to;
    }
    float unit = 1 / sqrtf(transform->square);
    for (int64_t j = 0; j < n; j++) x[j] = at[j] * unit;
}

TARGET_AVX512 static void transform_avx512(float *x, float *spare, int64_t n, const transform_t *transform) {
    body(x, spare, n, transform);
}

TARGET_AVX2 static void transform_avx2(float *x, float *spare, int64_t n, const transform_t *transform) {
    body(x, spare, n, transform);
}

INLINE void wide_butterflies(double *x, int64_t n, int64_t size, int64_t after) {
    for (int64_t half = after; half < size * after; half *= 2)
        for (int64_t start = 0; start < n; start += 2 * half)
            for (int64_t l = start; l < start + half; l++) {
                double u = x[l], v = x[l + half];
                x[l] = u + v, x[l + half] = u - v;
            }
}

/* Some `columns` of y = x matrix, a constant number that fits the registers. */
INLINE void wide_columns(int columns, const double *x, double *y, int64_t size, const float *matrix) {
    double sums[64] = {0};
    for (int64_t i = 0; i < size; i++)
        for (int j = 0; j < columns; j++) sums[j] += (double)matrix[i * size + j] * x[i];
    for (int j = 0; j < columns; j++) y[j] = sums[j];
}

INLINE void wide_dense(const double *x, double *y, int64_t n, int64_t size, int64_t after, const float *matrix) {
    for (int64_t start = 0; start < n; start += size * after) {
        if (after == 1) {
            int64_t j = 0;
            for (; j + 64 <= size; j += 64) wide_columns(64, x + start, y + start + j, size, matrix + j);
            for (; j + 8 <= size; j += 8) wide_columns(8, x + start, y + start + j, size, matrix + j);
            for (; j < size; j++) wide_columns(1, x + start, y + start + j, size, matrix + j);
            continue;
        }
        memset(y + start, 0, (size_t)(size * after) * sizeof *y);
        for (int64_t i = 0; i < size; i++)
            for (int64_t j = 0; j < size; j++)
                for (int64_t l = 0; l < after; l++)
                    y[start + j * after + l] += (double)matrix[i * size + j] * x[start + i * after + l];
    }
}

INLINE void wide_body(float *x, double *spare, int64_t n, const transform_t *transform) {
    double *at = spare, *other = spare + n, unit = 1 / sqrt(transform->square);
    for (int64_t j = 0; j < n; j++) at[j] = x[j];
    for (int64_t number = 0; number < transform->count; number++) {
        const pass_t *pass = transform->passes + number;
        if (pass->kind == BUTTERFLIES) {
            wide_butterflies(at, n, pass->size, pass->after);
            continue;
        }
        if (pass->kind == DENSE)
            wide_dense(at, other, n, pass->size, pass->after, pass->data);
        else
            for (int64_t j = 0; j < n; j++) other[j] = at[((const int32_t *)pass->data)[j]];
        double *done = other;
        other = at, at = done;
    }
    for (int64_t j = 0; j < n; j++) x[j] = (float)(at[j] * unit);
}

TARGET_AVX512 static void wide_avx512(float *x, double *spare, int64_t n, const transform_t *transform) {
    wide_body(x, spare, n, transform);
}

TARGET_AVX2 static void wide_avx2(float *x, double *spare, int64_t n, const transform_t *transform) {
    wide_body(x, spare, n, transform);
}

void transform_row(int isa, int dtype, float *x, double *spare, int64_t n, const transform_t *transform) {
    if (!transform || !transform->count) return;
    if (dtype == FLOAT32)
        (isa >= ISA_AVX512 ? wide_avx512 : wide_avx2)(x, spare, n, transform);
    else
        (isa >= ISA_AVX512 ? transform_avx512 : transform_avx2)(x, (float *)spare, n, transform);
}
