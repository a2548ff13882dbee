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

/* The grid fitted to a row, its scale rounded up to bfloat16 if it is `narrow`; `inverse` of a scale that is neither very
 * small nor very large, else 0. */
typedef struct {
    float low, high; /* the row's range, which contains 0 */
    float scale, inverse, zero, lowest, highest;
    int finite; /* whether all entries are */
} fit_t;

INLINE float narrowed(float scale) {
    uint16_t stored = round_up(scale);
    return to_float(&stored, BFLOAT16, 0);
}

INLINE fit_t fit(const float *x, int64_t n, grid_t grid, int narrow) {
    float low = 0, low_too = 0, high = 0, high_too = 0, finite = 0, finite_too = 0;
    int64_t half = n / 2; /* at once: one after the other would wait for each result */
#pragma omp simd reduction(min : low, low_too) reduction(max : high, high_too) reduction(+ : finite, finite_too)
    for (int64_t j = 0; j < half; j++) {
        float one = x[j], other = x[half + j];
        low = one < low ? one : low, low_too = other < low_too ? other : low_too;
        high = one > high ? one : high, high_too = other > high_too ? other : high_too;
        finite += one * 0.0f, finite_too += other * 0.0f;
    }
    if (n % 2) {
        low = x[n - 1] < low ? x[n - 1] : low, high = x[n - 1] > high ? x[n - 1] : high;
        finite += x[n - 1] * 0.0f;
    }
    low = low_too < low ? low_too : low, high = high_too > high ? high_too : high, finite += finite_too;
    fit_t fit = {.low = low, .high = high, .highest = (float)((1 << grid.bits) - 1)};
    if (grid.symmetric) {
        fit.lowest = -(float)(1 << (grid.bits - 1)), fit.highest = -fit.lowest - 1;
        fit.scale = (high > -low ? high : -low) * grid.clip / fit.highest;
        if (fit.scale == 0) fit.scale = 1;
        if (narrow) fit.scale = narrowed(fit.scale);
    } else {
        float bottom = low * grid.clip, top = high * grid.clip;
        fit.scale = (top - bottom) / fit.highest;
        if (fit.scale == 0) fit.scale = 1;
        if (narrow) fit.scale = narrowed(fit.scale);
        fit.zero = clamp(rintf(-bottom / fit.scale), fit.lowest, fit.highest);
    }
    fit.finite = finite == 0 && fit.scale - fit.scale == 0;
    fit.inverse = fit.scale > 0x1p-60f && fit.scale < 0x1p60f ? 1 / fit.scale : 0;
    return fit;
}

/* value / scale as the division rounds it. With the inverse it is four times as fast: their product is at most two units
 * in the last place off, a step with its remainder, which is exact, one, and a second step rounds correctly (Markstein,
 * Computation of elementary functions on the IBM RISC System/6000 processor, 1990). */
INLINE float quotient(float value, fit_t fit) {
    if (fit.inverse == 0) return value / fit.scale;
    float near = value * fit.inverse;
    near = __builtin_fmaf(__builtin_fmaf(-near, fit.scale, value), fit.inverse, near);
    return __builtin_fmaf(__builtin_fmaf(-near, fit.scale, value), fit.inverse, near);
}

/* The integer of the grid that is nearest to a value. */
INLINE float integer(float value, fit_t fit) {
    return clamp(rintf(quotient(value, fit)) + fit.zero, fit.lowest, fit.highest);
}

/* A row with a NaN or an infinity gets the scale NaN, and so does everything that is computed with it. */
INLINE void body(const float *x, int64_t in, grid_t grid, codes_t out, int64_t to) {
    fit_t of_row = fit(x, in, grid, 0);
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
        float padded[BLOCK];
        const float *values = x + start;
        int64_t here = in - start < BLOCK ? in - start : BLOCK;
        if (here < BLOCK) {
            memset(padded, 0, sizeof padded);
            values = memcpy(padded, values, (size_t)here * sizeof *values);
        }
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

/* What quantizing leaves of a row. */
INLINE void fake_body(const float *x, int64_t n, grid_t grid, int narrow, float *out) {
    fit_t of_row = fit(x, n, grid, narrow);
    for (int64_t j = 0; j < n; j++) out[j] = of_row.finite ? (integer(x[j], of_row) - of_row.zero) * of_row.scale : NAN;
}

TARGET_AVX512 static void fake_avx512(const float *x, int64_t n, grid_t grid, int narrow, float *out) {
    fake_body(x, n, grid, narrow, out);
}

TARGET_AVX2 static void fake_avx2(const float *x, int64_t n, grid_t grid, int narrow, float *out) {
    fake_body(x, n, grid, narrow, out);
}

void fake_quantize_row(float *x, int64_t n, grid_t grid) { fake_avx2(x, n, grid, 0, x); }

/* The same of `rows` rows of n floats. */
EXPORT void dfrot_fake_quantize(int isa, int threads, const float *x, int64_t rows, int64_t n, const grid_t *grid, int narrow,
                                float *out) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++)
        (isa >= ISA_AVX512 ? fake_avx512 : fake_avx2)(x + i * n, n, *grid, narrow, out + i * n);
}

/* The first entry of a row that is `value`, or `other`. */
INLINE int64_t place(const float *x, int64_t n, float value, float other) {
    int64_t j = 0;
    while (j < n - 1 && x[j] != value && x[j] != other) j++;
    return j;
}

/* The gradient through the quantization of a row, by dfrot.training.trained's rule. Returns what the clip ratio gets. */
INLINE float backward_body(const float *x, const float *upstream, int64_t n, grid_t grid, float *out) {
    fit_t of_row = fit(x, n, grid, 0);
    float bottom = of_row.lowest - of_row.zero, top = of_row.highest - of_row.zero, step = 0, above = 0, below = 0;
    if (!of_row.finite) {
        for (int64_t j = 0; j < n; j++) out[j] = NAN;
        return NAN;
    }
#pragma omp simd reduction(+ : step, above, below)
    for (int64_t j = 0; j < n; j++) {
        float steps = quotient(x[j], of_row), rounded = rintf(steps), slope = upstream[j];
        float inside = rounded < bottom || rounded > top ? 0 : slope;
        out[j] = inside;
        step += inside * (rounded - steps);
        above += rounded > top ? slope : 0;
        below += rounded < bottom ? slope : 0;
    }
    step /= of_row.highest;
    if (grid.symmetric) {
        float size = of_row.high > -of_row.low ? of_row.high : -of_row.low;
        float of_size = step + above + below * (of_row.lowest / of_row.highest);
        int64_t most = place(x, n, size, -size);
        out[most] += grid.clip * (x[most] > 0 ? of_size : x[most] < 0 ? -of_size : 0);
        return of_size * size;
    }
    if (of_row.high > 0) out[place(x, n, of_row.high, of_row.high)] += grid.clip * (step + above);
    if (of_row.low < 0) out[place(x, n, of_row.low, of_row.low)] += grid.clip * (below - step);
    return (step + above) * of_row.high + (below - step) * of_row.low;
}

TARGET_AVX512 static float backward_avx512(const float *x, const float *upstream, int64_t n, grid_t grid, float *out) {
    return backward_body(x, upstream, n, grid, out);
}

TARGET_AVX2 static float backward_avx2(const float *x, const float *upstream, int64_t n, grid_t grid, float *out) {
    return backward_body(x, upstream, n, grid, out);
}

/* The same of `rows` rows of n floats; `of_clip` (rows). */
EXPORT void dfrot_quantize_backward(int isa, int threads, const float *x, const float *upstream, int64_t rows, int64_t n,
                                    const grid_t *grid, float *out, float *of_clip) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++)
        of_clip[i] = (isa >= ISA_AVX512 ? backward_avx512 : backward_avx2)(x + i * n, upstream + i * n, n, *grid, out + i * n);
}
