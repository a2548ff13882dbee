/* Dynamic quantization of activations, token by token. The arithmetic is that of dfrot.quant.affine, operation by
 * operation in float32, so that the integers are the same.
 *
 * One body in plain C, which the compiler vectorizes for each instruction set. */
#include "dfrot.h"

#include <math.h>
#include <string.h>

INLINE float clamp(float value, float low, float high) {
    return value < low ? low : value > high ? high : value;
}

/* The grid fitted to a row. */
typedef struct {
    float scale, zero, lowest, highest;
    int finite; /* whether all entries are */
} fit_t;

INLINE fit_t fit(const float *x, int64_t n, grid_t grid) {
    float low = 0, high = 0, finite = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : finite)
    for (int64_t j = 0; j < n; j++) {
        low = x[j] < low ? x[j] : low;
        high = x[j] > high ? x[j] : high;
        finite += x[j] * 0.0f;
    }
    fit_t fit = {.highest = (float)((1 << grid.bits) - 1)};
    if (grid.symmetric) {
        fit.lowest = -(float)(1 << (grid.bits - 1)), fit.highest = -fit.lowest - 1;
        fit.scale = (high > -low ? high : -low) * grid.clip / fit.highest;
        if (fit.scale == 0) fit.scale = 1;
    } else {
        float bottom = low * grid.clip, top = high * grid.clip;
        fit.scale = (top - bottom) / fit.highest;
        if (fit.scale == 0) fit.scale = 1;
        fit.zero = clamp(rintf(-bottom / fit.scale), fit.lowest, fit.highest);
    }
    fit.finite = finite == 0 && fit.scale - fit.scale == 0;
    return fit;
}

/* The integer of the grid that is nearest to a value. */
INLINE float integer(float value, fit_t fit) {
    return clamp(rintf(value / fit.scale) + fit.zero, fit.lowest, fit.highest);
}

/* A row with a NaN or an infinity gets the scale NaN, and so does everything that is computed with it. */
INLINE void body(const float *x, int64_t in, grid_t grid, codes_t out, int64_t to) {
    fit_t of_row = fit(x, in, grid);
    float stored = grid.symmetric || grid.bits < 8 ? of_row.zero : 128; /* what codes are less than the grid's integers */
    int8_t *codes = out.codes + to * out.stride;
    int32_t *sums = out.sums + to * out.groups;
    out.scale[to] = of_row.finite ? of_row.scale : NAN;
    out.zero[to] = of_row.finite ? (int32_t)(of_row.zero - stored) : 0;
    memset(sums, 0, (size_t)out.groups * sizeof *sums);
    if (!of_row.finite) {
        memset(codes, 0, (size_t)out.stride);
        return;
    }
    for (int64_t start = 0; start < in; start += BLOCK) {
        int8_t block[BLOCK];
        float padded[BLOCK] = {0};
        const float *values = x + start;
        int64_t here = in - start < BLOCK ? in - start : BLOCK;
        if (here < BLOCK) values = memcpy(padded, values, (size_t)here * sizeof *values);
        for (int j = 0; j < BLOCK; j++) block[j] = (int8_t)(int)(integer(values[j], of_row) - stored);
        if (here < BLOCK) memset(block + here, 0, (size_t)(BLOCK - here));
        for (int64_t j = 0; j < here;) {
            int64_t group = (start + j) / out.group, end = (group + 1) * out.group - start;
            int32_t sum = 0;
            for (; j < end && j < here; j++) sum += block[j];
            sums[group] += sum;
        }
        if (out.paired)
            for (int j = 0; j < BLOCK / 2; j++)
                codes[start + j] = block[2 * j], codes[start + BLOCK / 2 + j] = block[2 * j + 1];
        else
            memcpy(codes + start, block, BLOCK);
    }
}

TARGET_AVX512 static void quantize_avx512(const float *x, int64_t in, grid_t grid, codes_t out, int64_t to) {
    body(x, in, grid, out, to);
}

TARGET_AVX2 static void quantize_avx2(const float *x, int64_t in, grid_t grid, codes_t out, int64_t to) {
    body(x, in, grid, out, to);
}

void quantize_row(int isa, const float *x, int64_t in, grid_t grid, codes_t out, int64_t to) {
    (isa >= ISA_AVX512 ? quantize_avx512 : quantize_avx2)(x, in, grid, out, to);
}

TARGET_AVX2 void fake_quantize_row(float *x, int64_t n, grid_t grid) {
    fit_t of_row = fit(x, n, grid);
    for (int64_t j = 0; j < n; j++)
        x[j] = of_row.finite ? (integer(x[j], of_row) - of_row.zero) * of_row.scale : NAN;
}
