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
    int64_t together = size * after; /* so long a stretch that its loops are worth it, and in the nearest cache */
    while (together < 1024 && n % (2 * together) == 0) together *= 2;
    for (const float *end = x + n; x < end; x += together) {
        int64_t apart = after;
        if (after == 1 && size >= LANES) {
            for (int64_t l = 0; l < together; l += LANES) lane_butterflies(x + l);
            apart = LANES;
        }
        for (; apart < size * after; apart *= 2)
            for (int64_t start = 0; start < together; start += 2 * apart) {
                int64_t l = start;
                for (; l + LANES <= start + apart; l += LANES) {
                    lanes_t u = LOAD(x + l), v = LOAD(x + l + apart);
                    STORE(x + l, u + v);
                    STORE(x + l + apart, u - v);
                }
                for (; l < start + apart; l++) {
                    float u = x[l], v = x[l + apart];
                    x[l] = u + v, x[l + apart] = u - v;
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

/* y[j, l] = Σ_i x[i, l] matrix[i, j] for `columns` j and `vectors` · LANES neighbouring l, of x of shape (size, after). */
INLINE void dense_tile(int columns, int vectors, const float *x, float *y, int64_t size, int64_t after,
                       const float *matrix) {
    lanes_t sums[8][2] = {{{0}}};
    for (int64_t i = 0; i < size; i++)
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sums[c][v] += matrix[i * size + c] * LOAD(x + i * after + v * LANES);
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) STORE(y + c * after + v * LANES, sums[c][v]);
}

/* The same for all j. */
INLINE void dense_lanes(int vectors, const float *x, float *y, int64_t size, int64_t after, const float *matrix) {
    int64_t j = 0;
    for (; j + 8 <= size; j += 8) dense_tile(8, vectors, x, y + j * after, size, after, matrix + j);
    for (; j + 4 <= size; j += 4) dense_tile(4, vectors, x, y + j * after, size, after, matrix + j);
    for (; j < size; j++) dense_tile(1, vectors, x, y + j * after, size, after, matrix + j);
}

/* y[b, j, l] = Σ_i x[b, i, l] matrix[i, j] for x of shape (…, size, after). */
INLINE void dense(const float *x, float *y, int64_t n, int64_t size, int64_t after, const float *matrix) {
    for (int64_t start = 0; start < n; start += size * after) {
        if (after == 1) {
            dense_row(x + start, y + start, size, matrix);
            continue;
        }
        int64_t from = 0;
        for (; from + 2 * LANES <= after; from += 2 * LANES)
            dense_lanes(2, x + start + from, y + start + from, size, after, matrix);
        for (; from + LANES <= after; from += LANES)
            dense_lanes(1, x + start + from, y + start + from, size, after, matrix);
        for (; from < after; from++)
            for (int64_t j = 0; j < size; j++) {
                float sum = 0;
                for (int64_t i = 0; i < size; i++) sum += matrix[i * size + j] * x[start + i * after + from];
                y[start + j * after + from] = sum;
            }
    }
}

INLINE void body(float *x, float *spare, int64_t n, const transform_t *transform) {
    float *at = x, root = sqrtf(transform->square), unit = 1 / root;
    for (int64_t number = 0; number < transform->count; number++) {
        const pass_t *pass = transform->passes + number;
        if (pass->kind == BUTTERFLIES) {
            butterflies(at, n, pass->size, pass->after);
            continue;
        }
        if (pass->kind == SUBTRACT) {
            for (int64_t j = 0; j < n; j++) at[j] -= root * ((const float *)pass->data)[j];
            continue;
        }
        float *to = at == x ? spare : x;
        if (pass->kind == DENSE)
            dense(at, to, n, pass->size, pass->after, pass->data);
        else
            for (int64_t j = 0; j < n; j++) to[j] = at[((const int32_t *)pass->data)[j]];
        at = to;
    }
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
    double *at = spare, *other = spare + n, root = sqrt(transform->square), unit = 1 / root;
    for (int64_t j = 0; j < n; j++) at[j] = x[j];
    for (int64_t number = 0; number < transform->count; number++) {
        const pass_t *pass = transform->passes + number;
        if (pass->kind == BUTTERFLIES) {
            wide_butterflies(at, n, pass->size, pass->after);
            continue;
        }
        if (pass->kind == SUBTRACT) {
            for (int64_t j = 0; j < n; j++) at[j] -= root * ((const float *)pass->data)[j];
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
