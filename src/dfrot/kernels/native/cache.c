/* Keys and values of 4 or 8 bits, into the cache and out of it. The arithmetic is that of dfrot.quant.affine. */
#include "cache.h"

#include <math.h>
#include <string.h>

INLINE void body(const float *x, float clip, const cache_t *cache, int64_t at) {
    float low = 0, high = 0, finite = 0, highest = (float)((1 << cache->bits) - 1);
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : finite)
    for (int64_t j = 0; j < cache->dim; j++) {
        low = x[j] < low ? x[j] : low;
        high = x[j] > high ? x[j] : high;
        finite += x[j] * 0.0f;
    }
    float bottom = low * clip, top = high * clip, scale = (top - bottom) / highest;
    uint16_t stored = round_up(scale);
    scale = to_float(&stored, BFLOAT16, 0);
    if (scale == 0) scale = 1, stored = to_bfloat16(1);
    uint8_t *codes = cache->codes + at * bytes_of(cache), whole[MOST_CHANNELS];
    if (finite != 0 || scale - scale != 0) { /* a NaN or an infinity */
        cache->scale[at] = to_bfloat16(NAN);
        cache->zero[at] = 0;
        memset(codes, 0, (size_t)bytes_of(cache));
        return;
    }
    cache->scale[at] = stored;
    float zero = rintf(-bottom / scale);
    zero = zero > highest ? highest : zero;
    cache->zero[at] = (uint8_t)(int)zero;
    for (int64_t j = 0; j < cache->dim; j++) {
        float code = rintf(x[j] / scale) + zero;
        whole[j] = (uint8_t)(int)(code < 0 ? 0 : code > highest ? highest : code);
    }
    if (cache->bits == 8)
        memcpy(codes, whole, (size_t)cache->dim);
    else
        for (int64_t j = 0; j < cache->dim / 2; j++) codes[j] = (uint8_t)(whole[2 * j] | whole[2 * j + 1] << 4);
}

TARGET_AVX512 static void pack_avx512(const float *x, float clip, const cache_t *cache, int64_t at) {
    body(x, clip, cache, at);
}

TARGET_AVX2 static void pack_avx2(const float *x, float clip, const cache_t *cache, int64_t at) {
    body(x, clip, cache, at);
}

void pack_token(int isa, const float *x, float clip, const cache_t *cache, int64_t at) {
    (isa >= ISA_AVX512 ? pack_avx512 : pack_avx2)(x, clip, cache, at);
}

/* Appends `tokens` tokens, x (batch, heads, tokens, dim) of element type `dtype`, from position `from` on; `transform`
 * rotates each head first. */
EXPORT void dfrot_append(int isa, int threads, const void *x, int dtype, int64_t batch, int64_t tokens, int64_t from,
                         const transform_t *transform, float clip, const cache_t *cache) {
    int64_t rows = batch * cache->heads * tokens;
#pragma omp parallel for num_threads(rows < 64 ? 1 : threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float wide[MOST_CHANNELS];
        double spare[2 * MOST_CHANNELS];
        for (int64_t j = 0; j < cache->dim; j++) wide[j] = to_float(x, dtype, row * cache->dim + j);
        transform_row(isa, dtype, wide, spare, cache->dim, transform);
        pack_token(isa, wide, clip, cache, row / tokens * cache->capacity + from + row % tokens);
    }
}

/* All tokens of the cache to `to` (batch, heads, tokens, dim) of element type `dtype`. */
TARGET_AVX2 static void unpack_row(const cache_t *cache, int64_t at, void *to, int dtype, int64_t row) {
    float wide[MOST_CHANNELS];
    unpack_tokens(cache, at, 1, wide);
    for (int64_t j = 0; j < cache->dim; j++) {
        float value = wide[place(cache, j)];
        if (dtype == FLOAT32)
            ((float *)to)[row * cache->dim + j] = value;
        else
            ((uint16_t *)to)[row * cache->dim + j] = to_bfloat16(value);
    }
}

EXPORT void dfrot_unpack_cache(int threads, const cache_t *cache, int64_t batch, int64_t tokens, void *to, int dtype) {
    int64_t rows = batch * cache->heads * tokens;
#pragma omp parallel for num_threads(rows < 64 ? 1 : threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        unpack_row(cache, row / tokens * cache->capacity + row % tokens, to, dtype, row);
}
