/* The packed keys or values of a layer. */
#ifndef DFROT_CACHE_H
#define DFROT_CACHE_H

#include "dfrot.h"

#define MOST_CHANNELS 512 /* of a head */

/* Each token of each head has its own scale (bfloat16) and zero point; x̂ = scale (code − zero). Codes of 4 bits lie two
 * in a byte, the even channel in the low nibble. All are (batch, heads, capacity, …). */
typedef struct {
    uint8_t *codes;
    uint16_t *scale;
    uint8_t *zero;
    int64_t heads, capacity, dim;
    int bits;
} cache_t;

INLINE int64_t bytes_of(const cache_t *cache) { return cache->dim * cache->bits / 8; }

/* One token of one head into place `at` of (batch, heads, capacity), as dfrot.quant.affine quantizes it with bfloat16
 * scales; a token with a NaN or an infinity gets the scale NaN. */
void pack_token(int isa, const float *x, float clip, const cache_t *cache, int64_t at);

/* Where channel j is while 4-bit codes are unpacked: even channels first, then odd ones. */
INLINE int64_t place(const cache_t *cache, int64_t j) {
    return cache->bits == 4 ? j / 2 + j % 2 * (cache->dim / 2) : j;
}

/* Tokens `at` … `at` + count − 1 of a head in float, channels by `place`. */
INLINE void unpack_tokens(const cache_t *cache, int64_t at, int64_t count, float *to) {
    for (int64_t t = 0; t < count; t++, to += cache->dim) {
        float scale = to_float(cache->scale, BFLOAT16, at + t);
        int32_t zero = cache->zero[at + t];
        const uint8_t *codes = cache->codes + (at + t) * bytes_of(cache);
        if (cache->bits == 8) {
            for (int64_t j = 0; j < cache->dim; j++) to[j] = scale * (float)(codes[j] - zero);
        } else {
            for (int64_t j = 0; j < cache->dim / 2; j++) to[j] = scale * (float)((codes[j] & 15) - zero);
            for (int64_t j = 0; j < cache->dim / 2; j++) to[cache->dim / 2 + j] = scale * (float)((codes[j] >> 4) - zero);
        }
    }
}

#endif
