/* y = Q(x) Ŵᵀ + b in integers: rows of x are quantized, multiplied by packed weights with exact int32 sums, scaled.
 *
 * Activation codes a are signed bytes with zero point z, weight codes w unsigned with zero point v per output channel
 * and group, so for every token and channel
 *
 *     y = s Σ_groups t (Σ a w − v Σ a − z (Σ w − group v))      s, t: scales of token and weight
 *
 * and the sums over codes alone are known beforehand.
 *
 * Weights stay as the checkpoint has them, row by row, for 4 bits two inputs in a byte, the even one in the low nibble.
 * So 64 bytes of a row are, after a mask and a shift, the even and the odd inputs of a block, and activation codes are
 * put in that order. A few tokens are multiplied by dot products along the rows (VNNI, AVX2); many by AMX, with rows of
 * weights as the left tile, which needs no rearranging, and tokens as the right one, rearranged once; or by VNNI, with
 * four inputs of sixteen channels in a register, rearranged once a chunk, and four inputs of one token in all of its
 * lanes; likewise by AVX-VNNI, and by AVX2 for weights of 4 bits. */
#include "linear.h"

#include <immintrin.h>
#include <string.h>

#define DEEP 8      /* tiles of weights that stay in the nearest cache while the tokens of a chunk pass */
#define AHEAD 8     /* rows of y that are asked for before they are written */
#define RUN 4       /* panels that a thread takes at a time */
#define NEAR 524288 /* bytes of tokens that stay in the second nearest cache while a run passes */
#define QUADS 256   /* four inputs each, of a panel whose weights are unpacked together: 32 KB */
#define TILE (16 * 64)

/* Σ w − group v */
INLINE int32_t balance_of(const weights_t *w, int64_t at) { return w->sums[at] - (int32_t)w->group * zero_of(w, at); }

INLINE void store(const weights_t *w, const codes_t *a, int64_t row, int64_t channel, float sum, void *y, int dtype,
                  int64_t y_row) {
    float value = sum * a->scale[row] + (w->bias ? w->bias[channel] : 0);
    int64_t at = y_row * w->out + channel;
    if (dtype == FLOAT32)
        ((float *)y)[at] = value;
    else
        ((uint16_t *)y)[at] = to_bfloat16(value);
}

/* The sums over codes of every row of a weight, by group. */
EXPORT void dfrot_code_sums(const uint8_t *codes, int64_t out, int64_t in, int bits, int64_t group, int32_t *sums) {
    int64_t bytes = in * bits / 8, groups = in / group, step = group * bits / 8;
    for (int64_t n = 0; n < out; n++)
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t *row = codes + n * bytes + g * step;
            int32_t sum = 0;
            for (int64_t i = 0; i < step; i++) sum += bits == 4 ? (row[i] & 15) + (row[i] >> 4) : row[i];
            sums[n * groups + g] = sum;
        }
}

/* ---- AVX2: products of bytes by way of 16-bit pairs, which hold 2 · 15 · 128 ---------------------------------------- */

TARGET_AVX2 INLINE __m256i dot_avx2(__m256i sum, __m256i w, __m256i a) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
}

TARGET_AVX2 INLINE int32_t sum_avx2(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

/* 32 bytes of a row, zeros beyond its end. */
TARGET_AVX2 INLINE __m256i load_avx2(const uint8_t *from, int64_t left) {
    if (left >= 32) return _mm256_loadu_si256((const __m256i *)from);
    uint8_t rest[32] = {0};
    memcpy(rest, from, (size_t)left);
    return _mm256_loadu_si256((const __m256i *)rest);
}

TARGET_AVX2 static void channel_avx2(const weights_t *w, const codes_t *a, int64_t row, int64_t channel, void *y,
                                     int dtype, int64_t y_row) {
    const uint8_t *codes = w->codes + channel * w->bytes;
    const int8_t *tokens = a->codes + row * a->stride;
    const __m256i nibble = _mm256_set1_epi8(15);
    int64_t step = w->groups == 1 ? w->bytes : w->bytes / w->groups;
    float sum = 0;
    for (int64_t g = 0; g < w->groups; g++) {
        __m256i dot = _mm256_setzero_si256();
        for (int64_t byte = g * step; byte < (g + 1) * step; byte += 32) {
            __m256i whole = load_avx2(codes + byte, w->bytes - byte), low = _mm256_and_si256(whole, nibble);
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(whole, 4), nibble);
            if (w->bits == 4) {
                const int8_t *block = tokens + byte / 64 * BLOCK + byte % 64;
                dot = dot_avx2(dot, low, _mm256_loadu_si256((const __m256i *)block));
                dot = dot_avx2(dot, high, _mm256_loadu_si256((const __m256i *)(block + 64)));
            } else { /* 16 · high + low: neither overflows 16 bits */
                __m256i block = _mm256_loadu_si256((const __m256i *)(tokens + byte));
                __m256i sixteens = dot_avx2(_mm256_setzero_si256(), high, block);
                dot = dot_avx2(_mm256_add_epi32(dot, _mm256_slli_epi32(sixteens, 4)), low, block);
            }
        }
        int64_t at = channel * w->groups + g;
        int32_t exact = sum_avx2(dot) - zero_of(w, at) * a->sums[row * a->groups + g];
        sum += scale_of(w, at) * (float)(exact - a->zero[row] * balance_of(w, at));
    }
    store(w, a, row, channel, sum, y, dtype, y_row);
}

TARGET_AVX2 static void panel_avx2(const weights_t *w, const codes_t *a, int64_t rows, int64_t first, void *y, int dtype,
                                   int64_t y_row) {
    for (int64_t channel = first; channel < first + PANEL && channel < w->out; channel++)
        for (int64_t row = 0; row < rows; row++) channel_avx2(w, a, row, channel, y, dtype, y_row + row);
}

/* Channels from `first` on, so many as a panel has, of all tokens of a chunk. */
typedef void (*panel_t)(const weights_t *w, const codes_t *a, int64_t rows, int64_t first, void *y, int dtype, int64_t y_row);

/* ---- AVX512-VNNI: a few tokens against four channels ------------------------------------------------------------------ */

/* What belongs to the groups that 64 bytes of a row pass through, lane by lane; a group's scale is in its first lane
 * alone. */
typedef struct {
    __m512i zero, balance;
    __m512 scale;
} group_lanes_t;

TARGET_AVX512 INLINE group_lanes_t group_lanes(const weights_t *w, int64_t channel, int64_t byte, int64_t step) {
    int32_t zero[16] = {0}, balance[16] = {0};
    float scale[16] = {0};
    for (int64_t lane = 0; lane < 16 && byte + 4 * lane < w->bytes; lane += step / 4) {
        int64_t at = channel * w->groups + (byte + 4 * lane) / step;
        zero[lane] = zero_of(w, at), balance[lane] = balance_of(w, at), scale[lane] = scale_of(w, at);
    }
    return (group_lanes_t){_mm512_loadu_si512(zero), _mm512_loadu_si512(balance), _mm512_loadu_ps(scale)};
}

/* Σ a of those groups, for one token. */
TARGET_AVX512 INLINE __m512i sum_lanes(const weights_t *w, const codes_t *a, int64_t row, int64_t byte, int64_t step) {
    int32_t sums[16] = {0};
    for (int64_t lane = 0; lane < 16 && byte + 4 * lane < w->bytes; lane += step / 4)
        sums[lane] = a->sums[row * a->groups + (byte + 4 * lane) / step];
    return _mm512_loadu_si512(sums);
}

/* In the first lane of each group the sum of its lanes. */
TARGET_AVX512 INLINE __m512i group_totals(__m512i dot, int64_t step) {
    if (step > 4) dot = _mm512_add_epi32(dot, _mm512_shuffle_epi32(dot, _MM_PERM_CDAB));
    if (step > 8) dot = _mm512_add_epi32(dot, _mm512_shuffle_epi32(dot, _MM_PERM_BADC));
    if (step > 16) dot = _mm512_add_epi32(dot, _mm512_shuffle_i32x4(dot, dot, _MM_PERM_CDAB));
    if (step > 32) dot = _mm512_add_epi32(dot, _mm512_shuffle_i32x4(dot, dot, _MM_PERM_BADC));
    return dot;
}

TARGET_AVX512 INLINE void channels_avx512(int channels, int rows, const weights_t *w, const codes_t *a, int64_t row,
                                          int64_t channel, void *y, int dtype, int64_t y_row) {
    const __m512i nibble = _mm512_set1_epi8(15);
    int64_t step = w->bytes / w->groups;
    __m512i dot[4][4];
    __m512 sums[4][4];
    for (int c = 0; c < channels; c++)
        for (int r = 0; r < rows; r++) dot[c][r] = _mm512_setzero_si512(), sums[c][r] = _mm512_setzero_ps();
    for (int64_t byte = 0; byte < w->bytes; byte += 64) {
        int64_t left = w->bytes - byte;
        __mmask64 there = left >= 64 ? ~0ull : (1ull << left) - 1;
        const int8_t *block = a->codes + row * a->stride + (w->bits == 4 ? 2 * byte : byte);
        for (int c = 0; c < channels; c++) {
            const uint8_t *codes = w->codes + (channel + c) * w->bytes + byte;
            __m512i whole = _mm512_maskz_loadu_epi8(there, codes);
            _mm_prefetch((const char *)((uintptr_t)codes + (uintptr_t)(channels * w->bytes)), _MM_HINT_T0); /* come next */
            if (w->bits == 4) {
                __m512i low = _mm512_and_si512(whole, nibble);
                __m512i high = _mm512_and_si512(_mm512_srli_epi16(whole, 4), nibble);
                for (int r = 0; r < rows; r++) {
                    const int8_t *tokens = block + r * a->stride;
                    dot[c][r] = _mm512_dpbusd_epi32(dot[c][r], low, _mm512_loadu_si512(tokens));
                    dot[c][r] = _mm512_dpbusd_epi32(dot[c][r], high, _mm512_loadu_si512(tokens + 64));
                }
            } else {
                for (int r = 0; r < rows; r++)
                    dot[c][r] = _mm512_dpbusd_epi32(dot[c][r], whole, _mm512_loadu_si512(block + r * a->stride));
            }
        }
        if (w->groups > 1 && (step < 64 || (byte + 64) % step == 0))
            for (int c = 0; c < channels; c++) {
                group_lanes_t lanes = group_lanes(w, channel + c, byte, step);
                for (int r = 0; r < rows; r++) {
                    __m512i v = _mm512_mullo_epi32(lanes.zero, sum_lanes(w, a, row + r, byte, step));
                    __m512i z = _mm512_mullo_epi32(lanes.balance, _mm512_set1_epi32(a->zero[row + r]));
                    __m512i exact = _mm512_sub_epi32(_mm512_sub_epi32(group_totals(dot[c][r], step), v), z);
                    sums[c][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), lanes.scale, sums[c][r]);
                    dot[c][r] = _mm512_setzero_si512();
                }
            }
    }
    for (int c = 0; c < channels; c++)
        for (int r = 0; r < rows; r++) {
            float sum = _mm512_reduce_add_ps(sums[c][r]);
            if (w->groups == 1) {
                int32_t exact = _mm512_reduce_add_epi32(dot[c][r]) - zero_of(w, channel + c) * a->sums[row + r];
                sum = scale_of(w, channel + c) * (float)(exact - a->zero[row + r] * balance_of(w, channel + c));
            }
            store(w, a, row + r, channel + c, sum, y, dtype, y_row + r);
        }
}

TARGET_AVX512 static void panel_avx512(const weights_t *w, const codes_t *a, int64_t rows, int64_t first, void *y,
                                       int dtype, int64_t y_row) {
    int64_t last = first + PANEL < w->out ? first + PANEL : w->out;
    for (int64_t row = 0; row < rows; row += 4) {
        int64_t channel = first;
#define PASS(R)                                                                                                        \
    for (; channel + 4 <= last; channel += 4) channels_avx512(4, R, w, a, row, channel, y, dtype, y_row + row);       \
    for (; channel < last; channel++) channels_avx512(1, R, w, a, row, channel, y, dtype, y_row + row);
        switch (rows - row) {
            case 1: PASS(1) break;
            case 2: PASS(2) break;
            case 3: PASS(3) break;
            default: PASS(4)
        }
#undef PASS
    }
}

/* ---- AVX512-VNNI, AVX-VNNI, AVX2: many tokens against 32 channels ------------------------------------------------------ */

/* What a thread multiplies in: weights of a panel, four inputs of every channel side by side, sums of integers, and sums
 * of scaled groups. */
typedef struct {
    uint8_t weights[QUADS][PANEL][4];
    int32_t dot[CHUNK][PANEL];
    float sums[CHUNK][PANEL];
} unpacked_t;

/* Blocks of 64 bytes of a panel's rows, `byte` … `end` − 1; zeros beyond the last channel and the end of a row. */
TARGET_AVX512 static void unpack_avx512(const weights_t *w, int64_t first, int64_t byte, int64_t end,
                                        uint8_t (*to)[PANEL][4]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (; byte < end; byte += 64, to += w->bits == 4 ? 32 : 16)
        for (int64_t half = 0; half < PANEL; half += 16) {
            __m512i low[16], high[16];
            for (int64_t i = 0; i < 16; i++) {
                int64_t channel = first + half + i, left = channel < w->out ? w->bytes - byte : 0;
                __mmask64 there = left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1;
                __m512i whole = _mm512_maskz_loadu_epi8(there, w->codes + channel * w->bytes + byte);
                low[i] = w->bits == 4 ? _mm512_and_si512(whole, nibble) : whole;
                high[i] = _mm512_and_si512(_mm512_srli_epi16(whole, 4), nibble);
            }
            transpose(low);
            for (int i = 0; i < 16; i++) _mm512_store_si512(to[i][half], low[i]);
            if (w->bits != 4) continue;
            transpose(high);
            for (int i = 0; i < 16; i++) _mm512_store_si512(to[16 + i][half], high[i]);
        }
}

/* The codes of four inputs side by side. */
INLINE int32_t four_inputs(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return four;
}

/* Adds so many quads of inputs to the sums of a few tokens, or begins these. */
TARGET_AVX512 INLINE void add_quads(int rows, const uint8_t (*weights)[PANEL][4], const int8_t *tokens, int64_t stride,
                                    int64_t quads, int fresh, int32_t (*dot)[PANEL]) {
    __m512i sums[12][2];
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) sums[r][h] = fresh ? _mm512_setzero_si512() : _mm512_load_si512(dot[r] + 16 * h);
    for (int64_t q = 0; q < quads; q++) {
        __m512i left = _mm512_load_si512(weights[q]), right = _mm512_load_si512(weights[q] + 16);
        for (int r = 0; r < rows; r++) {
            __m512i token = _mm512_set1_epi32(four_inputs(tokens + r * stride + 4 * q));
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], left, token);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], right, token);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) _mm512_store_si512(dot[r] + 16 * h, sums[r][h]);
}

/* The same, from quad `at` on, for all tokens of a chunk; codes of up to three rows beyond are read. */
TARGET_AVX512 static void add_avx512(const codes_t *a, int64_t rows, const uint8_t (*weights)[PANEL][4], int64_t at,
                                     int64_t quads, int64_t fresh, int32_t (*dot)[PANEL]) {
    int64_t row = 0;
#define ADD(R) add_quads(R, weights + at, a->codes + row * a->stride + 4 * at, a->stride, quads, (int)fresh, dot + row)
    for (; row + 12 <= rows; row += 12) ADD(12);
    for (; row + 8 <= rows; row += 8) ADD(8);
    for (; row < rows; row += 4) ADD(4);
#undef ADD
}

/* Adds group `g` to the sums of all tokens, or after the last group stores them. */
INLINE void finish_body(const weights_t *w, const codes_t *a, int64_t rows, int64_t first, int64_t g, unpacked_t *own,
                        void *y, int dtype, int64_t y_row) {
    int64_t count = w->out - first < PANEL ? w->out - first : PANEL;
    int32_t zero[PANEL] = {0}, balance[PANEL] = {0};
    float scale[PANEL] = {0}, bias[PANEL] = {0};
    for (int64_t c = 0; c < count; c++) {
        int64_t at = (first + c) * w->groups + g;
        zero[c] = zero_of(w, at), balance[c] = balance_of(w, at), scale[c] = scale_of(w, at);
        if (w->bias) bias[c] = w->bias[first + c];
    }
    for (int64_t row = 0; row < rows; row++) {
        const int32_t *dot = own->dot[row], of_codes = a->sums[row * a->groups + g], of_zero = a->zero[row];
        float *sums = own->sums[row], finished[PANEL];
        for (int c = 0; c < PANEL; c++) {
            float sum = (float)(dot[c] - zero[c] * of_codes - of_zero * balance[c]) * scale[c];
            sums[c] = g ? sums[c] + sum : sum;
        }
        if (g + 1 < w->groups) continue;
        for (int c = 0; c < PANEL; c++) finished[c] = sums[c] * a->scale[row] + bias[c];
        int64_t at = (y_row + row) * w->out + first;
        if (dtype == FLOAT32) {
            memcpy((float *)y + at, finished, (size_t)count * sizeof(float));
        } else {
            uint16_t narrow[PANEL];
            for (int c = 0; c < PANEL; c++) narrow[c] = to_bfloat16(finished[c]);
            memcpy((uint16_t *)y + at, narrow, (size_t)count * sizeof *narrow);
        }
    }
}

/* 8 × 8 entries of 32 bits: row i of the result is column i of `v`. */
TARGET_AVX2 INLINE void transpose_avx2(__m256i v[8]) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 2)
        t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) { /* v[4 q + i] has columns i and 4 + i of rows 4 q … 4 q + 3 */
            v[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        t[i] = _mm256_permute2x128_si256(v[i], v[4 + i], 0x20), t[4 + i] = _mm256_permute2x128_si256(v[i], v[4 + i], 0x31);
    for (int i = 0; i < 8; i++) v[i] = t[i];
}

/* The same by AVX2. */
TARGET_AVX2 static void unpack_avx2(const weights_t *w, int64_t first, int64_t byte, int64_t end, uint8_t (*to)[PANEL][4]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (; byte < end; byte += 64, to += w->bits == 4 ? 32 : 16)
        for (int64_t half = 0; half < 64; half += 32)
            for (int64_t c = 0; c < PANEL; c += 8) {
                __m256i low[8], high[8];
                for (int64_t i = 0; i < 8; i++) {
                    int64_t channel = first + c + i, left = channel < w->out ? w->bytes - byte - half : 0;
                    __m256i whole = _mm256_setzero_si256();
                    if (left > 0) whole = load_avx2(w->codes + channel * w->bytes + byte + half, left);
                    low[i] = w->bits == 4 ? _mm256_and_si256(whole, nibble) : whole;
                    high[i] = _mm256_and_si256(_mm256_srli_epi16(whole, 4), nibble);
                }
                transpose_avx2(low);
                for (int i = 0; i < 8; i++) _mm256_store_si256((__m256i *)to[half / 4 + i][c], low[i]);
                if (w->bits != 4) continue;
                transpose_avx2(high);
                for (int i = 0; i < 8; i++) _mm256_store_si256((__m256i *)to[16 + half / 4 + i][c], high[i]);
            }
}

/* For weights of 4 bits: `most` quads' sums of two products stay within 16 bits. */
TARGET_AVX2 INLINE void quads_avx2(int rows, const uint8_t (*weights)[PANEL][4], const int8_t *tokens, int64_t stride,
                                   int64_t quads, int64_t most, int64_t fresh, int32_t (*dot)[PANEL]) {
    for (int64_t from = 0; from < quads; from += most, fresh = 0)
        for (int h = 0; h < PANEL; h += 16) {
            __m256i narrow[4][2];
            for (int r = 0; r < rows; r++) narrow[r][0] = narrow[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int64_t q = from, until = from + most < quads ? from + most : quads; q < until; q++) {
                __m256i left = _mm256_load_si256((const __m256i *)weights[q][h]);
                __m256i right = _mm256_load_si256((const __m256i *)weights[q][h + 8]);
                for (int r = 0; r < rows; r++) {
                    __m256i token = _mm256_set1_epi32(four_inputs(tokens + r * stride + 4 * q));
                    narrow[r][0] = _mm256_add_epi16(narrow[r][0], _mm256_maddubs_epi16(left, token));
                    narrow[r][1] = _mm256_add_epi16(narrow[r][1], _mm256_maddubs_epi16(right, token));
                }
            }
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < 2; v++) {
                    __m256i *at = (__m256i *)(dot[r] + h + 8 * v);
                    __m256i sum = _mm256_madd_epi16(narrow[r][v], _mm256_set1_epi16(1));
                    _mm256_store_si256(at, fresh ? sum : _mm256_add_epi32(_mm256_load_si256(at), sum));
                }
        }
}

TARGET_AVX2 static void add_avx2(const codes_t *a, int64_t rows, const uint8_t (*weights)[PANEL][4], int64_t at,
                                 int64_t quads, int64_t fresh, int32_t (*dot)[PANEL]) {
    int64_t most = INT16_MAX / (2 * 15 * a->largest);
    for (int64_t row = 0; row < rows; row += 4)
        quads_avx2(4, weights + at, a->codes + row * a->stride + 4 * at, a->stride, quads, most, fresh, dot + row);
}

TARGET_AVXVNNI INLINE void quads_avxvnni(int rows, const uint8_t (*weights)[PANEL][4], const int8_t *tokens, int64_t stride,
                                         int64_t quads, int64_t fresh, int32_t (*dot)[PANEL]) {
    for (int h = 0; h < PANEL; h += 16) {
        __m256i sums[6][2];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < 2; v++) {
                const __m256i *at = (const __m256i *)(dot[r] + h + 8 * v);
                sums[r][v] = fresh ? _mm256_setzero_si256() : _mm256_load_si256(at);
            }
        for (int64_t q = 0; q < quads; q++) {
            __m256i left = _mm256_load_si256((const __m256i *)weights[q][h]);
            __m256i right = _mm256_load_si256((const __m256i *)weights[q][h + 8]);
            for (int r = 0; r < rows; r++) {
                __m256i token = _mm256_set1_epi32(four_inputs(tokens + r * stride + 4 * q));
                sums[r][0] = _mm256_dpbusd_avx_epi32(sums[r][0], left, token);
                sums[r][1] = _mm256_dpbusd_avx_epi32(sums[r][1], right, token);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < 2; v++) _mm256_store_si256((__m256i *)(dot[r] + h + 8 * v), sums[r][v]);
    }
}

TARGET_AVXVNNI static void add_avxvnni(const codes_t *a, int64_t rows, const uint8_t (*weights)[PANEL][4], int64_t at,
                                       int64_t quads, int64_t fresh, int32_t (*dot)[PANEL]) {
    int64_t row = 0;
#define ADD(R) quads_avxvnni(R, weights + at, a->codes + row * a->stride + 4 * at, a->stride, quads, fresh, dot + row)
    for (; row + 6 <= rows; row += 6) ADD(6);
    for (; row < rows; row += 2) ADD(2);
#undef ADD
}

typedef void (*unpack_t)(const weights_t *w, int64_t first, int64_t byte, int64_t end, uint8_t (*to)[PANEL][4]);
typedef void (*add_t)(const codes_t *a, int64_t rows, const uint8_t (*weights)[PANEL][4], int64_t at, int64_t quads,
                      int64_t fresh, int32_t (*dot)[PANEL]);

/* A panel against a chunk: weights are unpacked once, as many at a time as stay in a near cache. */
INLINE void many_body(unpack_t unpack, add_t add, const weights_t *w, const codes_t *a, int64_t rows, int64_t first,
                      void *y, int dtype, int64_t y_row) {
    unpacked_t *own = scratch(SLOT_TILES, 0);
    int64_t per_block = w->bits == 4 ? 32 : 16, slab = QUADS / per_block * 64, step = w->bytes / w->groups;
    for (int64_t from = 0; from < w->bytes; from += slab) {
        int64_t until = from + slab < w->bytes ? from + slab : w->bytes;
        unpack(w, first, from, until, own->weights);
        for (int64_t byte = from, stop; byte < until; byte = stop) {
            int64_t g = byte / step, fresh = byte % step == 0;
            stop = (g + 1) * step < until ? (g + 1) * step : until;
            int64_t blocks = byte % 64 ? 0 : (stop - byte) / 64, rest = stop - byte - 64 * blocks;
            int64_t quad = byte / 64 * per_block, last = quad + blocks * per_block;
            const uint8_t(*weights)[PANEL][4] = own->weights - from / 64 * per_block;
            if (blocks) add(a, rows, weights, quad, last - quad, fresh, own->dot), fresh = 0;
            /* a part of a block: of its even inputs, and of its odd ones */
            for (int64_t part = 0; rest && part < per_block; part += 16, fresh = 0)
                add(a, rows, weights, last + part + byte % 64 / 4, up(rest, 4) / 4, fresh, own->dot);
            if (stop % step == 0) finish_body(w, a, rows, first, g, own, y, dtype, y_row);
        }
    }
}

TARGET_AVX512 static void many_avx512(const weights_t *w, const codes_t *a, int64_t rows, int64_t first, void *y, int dtype,
                                      int64_t y_row) {
    many_body(unpack_avx512, add_avx512, w, a, rows, first, y, dtype, y_row);
}

TARGET_AVX2 static void many_avx2(const weights_t *w, const codes_t *a, int64_t rows, int64_t first, void *y, int dtype,
                                  int64_t y_row) {
    many_body(unpack_avx2, add_avx2, w, a, rows, first, y, dtype, y_row);
}

TARGET_AVXVNNI static void many_avxvnni(const weights_t *w, const codes_t *a, int64_t rows, int64_t first, void *y, int dtype,
                                        int64_t y_row) {
    many_body(unpack_avx2, add_avxvnni, w, a, rows, first, y, dtype, y_row);
}

/* ---- AMX: 32 channels against 32 tokens in four tiles of int32 --------------------------------------------------------- */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} tile_config_t;

/* Inline assembly, because gcc 12's intrinsic does not tell the compiler that the whole structure is read. */
TARGET_AMX void configure_tiles(int depth) {
    tile_config_t config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes_per_row[i] = 64, config.rows[i] = 16;
    for (int i = 4; i < 6; i++) config.bytes_per_row[i] = (uint16_t)depth;
    for (int i = 6; i < 8; i++) config.rows[i] = (uint8_t)(depth / 4);
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

TARGET_AMX void release_tiles(void) { _tile_release(); }

/* Sixteen tokens' codes, [stride/64][16][64], into the order of a right tile, [stride/64][quad 16][token 16][4]; their
 * sums, [16][groups], into [groups][16]. */
TARGET_AVX512 static void tokens_to_tiles(const codes_t *a, int64_t row, int8_t *tiles) {
    for (int64_t at = 0; at < a->stride; at += 64) {
        __m512i v[16];
        for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(a->codes + (row + i) * a->stride + at);
        transpose(v);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(tiles + at * 16 + i * 64, v[i]);
    }
    if (a->groups == 1) return;
    int32_t *sums = scratch(SLOT_ROW, (size_t)(16 * a->groups) * sizeof *sums);
    memcpy(sums, a->sums + row * a->groups, (size_t)(16 * a->groups) * sizeof *sums);
    for (int64_t g = 0; g < a->groups; g++)
        for (int i = 0; i < 16; i++) a->sums[row * a->groups + g * 16 + i] = sums[i * a->groups + g];
}

/* What a thread multiplies in. Weights of a panel, one byte each, [DEEP][PANEL][64], now and next; sums of integers,
 * [panel of the run][token pair][four tiles]; sums of scaled groups; and what goes to y when a run is done,
 * [token][channel] of its element type, because y's rows are pages apart. */
typedef struct {
    uint8_t weights[2][DEEP][PANEL][64];
    int32_t dot[RUN][CHUNK / 32][4][16][16];
    float sums[CHUNK / 32][4][16][16];
    float finished[CHUNK][RUN * PANEL];
} own_t;

/* A product that AMX computes. Panels go through in slabs of DEEP tiles of inputs, tokens in `pairs` of tiles; a run of
 * panels takes `part` slabs at a time, whose tokens stay in the second nearest cache. */
typedef struct {
    const weights_t *w;
    const codes_t *a;
    const int8_t *tokens; /* tiles of the codes, two by two */
    int64_t rows, pairs;
    int64_t per_block, tiles, slabs, part; /* tiles that 64 bytes of a row make; tiles and slabs of a row */
    int64_t step, depth;                   /* bytes of a group, and of a product of tiles */
    int zeros;                             /* whether some token has a zero point */
    own_t *own;
    void *y;
    int dtype;
    int64_t y_row;
} product_t;

/* Weights of a panel in one slab that are being unpacked: blocks of 64 bytes of a row, of which `done` are. */
typedef struct {
    const uint8_t *codes; /* of the panel's first channel in this slab */
    int64_t channels, bytes, done, blocks;
    int64_t ahead; /* bytes from a block to the one in its place in the slab after this one */
    int shift;     /* a row has 2^shift blocks */
    uint8_t (*to)[PANEL][64];
} unpacking_t;

/* A slab of a panel; `panel` is that after the run when all is done. */
typedef struct {
    int64_t panel, slab;
} place_t;

/* Slab by slab, panel by panel, part by part. */
INLINE place_t after(const product_t *p, place_t at, int64_t first, int64_t last) {
    int64_t part = at.slab / p->part * p->part;
    if (at.slab + 1 < p->slabs && at.slab + 1 < part + p->part) return (place_t){at.panel, at.slab + 1};
    if (at.panel + 1 < last) return (place_t){at.panel + 1, part};
    return part + p->part < p->slabs ? (place_t){first, part + p->part} : (place_t){last, 0};
}

INLINE int64_t byte_at(const product_t *p, place_t at) {
    return at.panel * PANEL * p->w->bytes + at.slab * DEEP / p->per_block * 64;
}

INLINE unpacking_t unpacking(const product_t *p, place_t at, place_t then, uint8_t (*to)[PANEL][64]) {
    int64_t byte = at.slab * DEEP / p->per_block * 64;
    int shift = p->per_block == 2 ? 2 : 3;
    return (unpacking_t){p->w->codes + byte_at(p, at), p->w->out - at.panel * PANEL, p->w->bytes - byte, 0,
                         PANEL << shift, byte_at(p, then) - byte_at(p, at), shift, to};
}

/* Unpacks `count` blocks more, if so many are left, and asks for those of the next slab; channels beyond the last and
 * inputs beyond the row are zeros. */
TARGET_AMX INLINE void unpack_weights(const product_t *p, unpacking_t *u, int64_t count) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t until = u->done + count < u->blocks ? u->done + count : u->blocks; u->done < until; u->done++) {
        int64_t c = u->done >> u->shift, block = u->done & ((1 << u->shift) - 1);
        int64_t left = c < u->channels ? u->bytes - block * 64 : 0;
        __mmask64 there = left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1;
        int64_t at = c * p->w->bytes + block * 64;
        __m512i whole = _mm512_maskz_loadu_epi8(there, u->codes + at);
        _mm_prefetch((const char *)((uintptr_t)u->codes + (uintptr_t)(at + u->ahead)), _MM_HINT_T1);
        if (p->per_block == 2) {
            _mm512_store_si512(u->to[2 * block][c], _mm512_and_si512(whole, nibble));
            _mm512_store_si512(u->to[2 * block + 1][c], _mm512_and_si512(_mm512_srli_epi16(whole, 4), nibble));
        } else {
            _mm512_store_si512(u->to[block][c], whole);
        }
    }
}

/* What one group adds to the sums of a channel, for sixteen tokens whose Σ a are `of_tokens`. */
TARGET_AVX512 INLINE __m512 scaled(const weights_t *w, int64_t at, __m512i dot, __m512i of_tokens, int zeros,
                                   __m512i of_zeros) {
    __m512i exact = _mm512_sub_epi32(dot, _mm512_mullo_epi32(of_tokens, _mm512_set1_epi32(zero_of(w, at))));
    if (zeros) exact = _mm512_sub_epi32(exact, _mm512_mullo_epi32(of_zeros, _mm512_set1_epi32(balance_of(w, at))));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(scale_of(w, at)));
}

/* The sums of sixteen channels and tokens, channels as rows, to `finished`. */
TARGET_AMX INLINE void store_tile(const product_t *p, int64_t token, int64_t channel, __m512 sums[16]) {
    const weights_t *w = p->w;
    __mmask16 there = w->out - channel < 16 ? (__mmask16)((1 << (w->out - channel)) - 1) : 0xffff;
    __m512 bias = w->bias ? _mm512_maskz_loadu_ps(there, w->bias + channel) : _mm512_setzero_ps();
    __m512i v[16];
    for (int i = 0; i < 16; i++) v[i] = _mm512_castps_si512(sums[i]);
    transpose(v);
    for (int64_t i = 0; i < 16; i++) {
        __m512 scale = _mm512_set1_ps(p->a->scale[token + i]);
        __m512 values = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(v[i]), scale), bias);
        float *row = p->own->finished[token + i];
        if (p->dtype == FLOAT32)
            _mm512_store_ps(row + channel % (RUN * PANEL), values);
        else
            _mm256_store_si256((__m256i *)((uint16_t *)row + channel % (RUN * PANEL)), (__m256i)_mm512_cvtneps_pbh(values));
    }
}

/* Adds group `g` to the sums of sixteen channels and tokens, or after the last group stores them. */
TARGET_AMX INLINE void finish_group(const product_t *p, int64_t panel, int64_t g, int64_t token, int half,
                                    int32_t (*dots)[4][16][16]) {
    const weights_t *w = p->w;
    int64_t channel = panel * PANEL + 16 * half;
    if (token >= p->rows || channel >= w->out) return;
    int tile = 2 * half + (int)(token / 16 % 2), last = g + 1 == w->groups;
    int64_t there = w->out - channel < 16 ? w->out - channel : 16;
    __m512i of_tokens = _mm512_loadu_si512(p->a->sums + token * p->a->groups + 16 * g);
    __m512i of_zeros = _mm512_loadu_si512(p->a->zero + token);
    __m512 sums[16];
    for (int i = 0; i < 16; i++) {
        float *kept = p->own->sums[token / 32][tile][i];
        sums[i] = g ? _mm512_load_ps(kept) : _mm512_setzero_ps();
        if (i >= there) continue;
        __m512i dot = _mm512_load_si512(dots[token / 32][tile][i]);
        sums[i] = _mm512_add_ps(sums[i], scaled(w, (channel + i) * w->groups + g, dot, of_tokens, p->zeros, of_zeros));
        if (!last) _mm512_store_ps(kept, sums[i]);
    }
    if (last) store_tile(p, token, channel, sums);
}

/* A slab of a panel against a pair of token tiles, `at_once` blocks of the next slab unpacked after every four products: the
 * processor does both at once. Sums of channels that have one group are finished later. */
TARGET_AMX INLINE void multiply_pair(const product_t *p, int64_t panel, int64_t slab, int64_t pair,
                                     uint8_t (*weights)[PANEL][64], int32_t (*dots)[4][16][16], unpacking_t *u,
                                     int64_t at_once) {
    int32_t(*dot)[16][16] = dots[pair];
    const int8_t *left = p->tokens + pair * 32 * p->a->stride, *right = left + 16 * p->a->stride;
    int64_t from = slab * DEEP, until = from + DEEP < p->tiles ? from + DEEP : p->tiles;
    int64_t byte = from / p->per_block * 64, end = until / p->per_block * 64;
    if (end > p->step * p->w->groups) end = p->step * p->w->groups;
    while (byte < end) { /* group by group */
        int64_t g = byte / p->step, stop = (g + 1) * p->step < end ? (g + 1) * p->step : end;
        if (byte % p->step == 0) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, dot[0], 64);
            _tile_loadd(1, dot[1], 64);
            _tile_loadd(2, dot[2], 64);
            _tile_loadd(3, dot[3], 64);
        }
        for (int64_t at = byte; at < stop; at += p->depth)
            for (int64_t part = 0; part < p->per_block; part++) {
                int64_t tile = at / 64 * p->per_block + part, within = at % 64;
                const uint8_t *channels = weights[tile - from][0] + within;
                _tile_loadd(4, channels, 64);
                _tile_loadd(6, left + tile * TILE + within * 16, 64);
                _tile_dpbusd(0, 4, 6);
                _tile_loadd(7, right + tile * TILE + within * 16, 64);
                _tile_dpbusd(1, 4, 7);
                _tile_loadd(5, channels + TILE, 64);
                _tile_dpbusd(2, 5, 6);
                _tile_dpbusd(3, 5, 7);
                unpack_weights(p, u, at_once);
            }
        _tile_stored(0, dot[0], 64);
        _tile_stored(1, dot[1], 64);
        _tile_stored(2, dot[2], 64);
        _tile_stored(3, dot[3], 64);
        if (p->w->groups > 1 && stop % p->step == 0)
            for (int i = 0; i < 4; i++) finish_group(p, panel, g, pair * 32 + i / 2 * 16, i % 2, dots);
        byte = stop;
    }
}

/* What a run of panels has finished, to y. */
TARGET_AMX static void store_run(const product_t *p, int64_t panel, int64_t last) {
    int64_t channel = panel * PANEL, end = last * PANEL < p->w->out ? last * PANEL : p->w->out;
    size_t entry = p->dtype == FLOAT32 ? 4 : 2, bytes = (size_t)(end - channel) * entry;
    for (int64_t token = 0; token < p->rows; token++) {
        char *to = (char *)p->y + (size_t)((p->y_row + token) * p->w->out + channel) * entry;
        const char *from = (const char *)p->own->finished[token];
        for (size_t ahead = 0; ahead < bytes; ahead += 64)
            __builtin_prefetch((void *)((uintptr_t)to + AHEAD * (size_t)p->w->out * entry + ahead), 1);
        size_t byte = 0;
        for (; byte + 64 <= bytes; byte += 64) _mm512_storeu_si512(to + byte, _mm512_load_si512(from + byte));
        memcpy(to + byte, from + byte, bytes - byte);
    }
}

/* A run of panels, `first` … `last` − 1. While one multiplies, the one before is finished piece by piece. */
TARGET_AMX static void panels_amx(const product_t *p, int64_t first, int64_t last) {
    own_t *own = p->own;
    int64_t shortest = (p->slabs - 1) % p->part + 1, at_once = up(4, shortest) / shortest;
    int64_t pieces = 4 * p->pairs, finished = pieces;
    place_t at = {first, 0}, next = after(p, at, first, last);
    unpacking_t u = unpacking(p, at, next, own->weights[0]);
    unpack_weights(p, &u, u.blocks);
    for (int now = 0; at.panel < last; at = next, next = after(p, at, first, last), now = !now) {
        int64_t steps = p->pairs * (at.slab + 1 < p->slabs ? DEEP : p->tiles - at.slab * DEEP);
        if (next.panel < last) u = unpacking(p, next, after(p, next, first, last), own->weights[!now]);
        int64_t blocks = up(u.blocks - u.done, steps) / steps;
        for (int64_t pair = 0; pair < p->pairs; pair++) {
            multiply_pair(p, at.panel, at.slab, pair, own->weights[now], own->dot[at.panel - first], &u, blocks);
            for (int64_t i = 0; i < at_once && finished < pieces; i++, finished++)
                finish_group(p, at.panel - 1, 0, finished / 2 * 16, finished % 2, own->dot[at.panel - 1 - first]);
        }
        unpack_weights(p, &u, u.blocks);
        if (p->w->groups == 1 && at.slab + 1 == p->slabs) finished = 0;
    }
    for (; finished < pieces; finished++)
        finish_group(p, last - 1, 0, finished / 2 * 16, finished % 2, own->dot[last - 1 - first]);
    store_run(p, first, last);
}

/* ---- Chunks of tokens, for all threads of a parallel region together ------------------------------------------------ */

size_t chunk_bytes(const weights_t *w, int64_t most) { /* rows that are not quantized have 4 bytes an input */
    return (size_t)(4 * most * up(w->in, BLOCK) + (2 + w->groups) * most * 4);
}

/* The size that a code of a grid may have. */
INLINE int largest_code(grid_t grid) {
    return grid.bits >= 8 ? 128 : grid.symmetric ? 1 << (grid.bits - 1) : (1 << grid.bits) - 1;
}

chunk_t chunk_in(uint8_t *memory, const weights_t *w, int64_t most, grid_t grid, int stream) {
    chunk_t chunk = {.codes = {.stride = up(w->in, BLOCK), .paired = w->bits == 4, .group = w->group,
                               .groups = w->groups, .largest = largest_code(grid)},
                     .floating = grid.bits > 8, .interleaved = w->bits == 4, .stream = stream};
    int64_t code_bytes = (chunk.floating ? 2 : 1) * most * chunk.codes.stride, row_bytes = most * 4;
    chunk.codes.codes = (int8_t *)memory;
    chunk.tiles = (int8_t *)memory + code_bytes;
    chunk.codes.scale = (float *)(memory + 2 * code_bytes);
    chunk.codes.zero = (int32_t *)(memory + 2 * code_bytes + row_bytes);
    chunk.codes.sums = (int32_t *)(memory + 2 * code_bytes + 2 * row_bytes);
    return chunk;
}

void fill_chunk(int isa, chunk_t *chunk, int64_t rows, int64_t in, row_t row_of, const void *source, int dtype,
                const transform_t *transform, grid_t grid) {
    int element = chunk->floating ? element_of(isa, chunk, rows) : FLOAT32;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < up(rows, 16); tile += 16) {
        float *row = scratch(SLOT_ROW, 0);
        double *spare = (double *)(row + up(in, 2));
        for (int64_t i = tile; i < tile + 16 && i < rows; i++) {
            row_of(source, i, in, row);
            transform_row(isa, dtype, row, spare, in, transform);
            if (chunk->floating)
                keep_row(isa, element, row, in, chunk, i);
            else
                quantize_row(isa, row, in, grid, chunk->codes, i);
        }
        if (!tiled(isa, rows)) continue;
        if (!chunk->floating)
            tokens_to_tiles(&chunk->codes, tile, chunk->tiles + tile * chunk->codes.stride);
        else if (element == BFLOAT16)
            keep_tiles(chunk, tile);
    }
}

void multiply_chunk(int isa, const chunk_t *chunk, int64_t rows, const weights_t *w, void *y, int dtype, int64_t y_row) {
    int64_t panels = up(w->out, PANEL) / PANEL;
    if (chunk->floating) {
        multiply_floats(isa, chunk, rows, w, y, dtype, y_row);
        return;
    }
    if (tiled(isa, rows)) {
        int64_t per_block = w->bits == 4 ? 2 : 1, tiles = up(w->bytes, 64) / 64 * per_block;
        int64_t step = w->groups == 1 ? up(w->bytes, 64) : w->bytes / w->groups, depth = step < 64 ? step : 64;
        int64_t slabs = up(tiles, DEEP) / DEEP, parts = w->groups == 1 ? up(rows * w->in, NEAR) / NEAR : 1;
        product_t p = {w, &chunk->codes, chunk->tiles, rows, up(rows, 32) / 32, per_block, tiles, slabs,
                       up(slabs, parts) / parts, step, depth, 0, scratch(SLOT_TILES, 0), y, dtype, y_row};
        for (int64_t row = 0; row < rows; row++) p.zeros |= chunk->codes.zero[row];
        configure_tiles((int)depth);
#pragma omp for schedule(guided) nowait
        for (int64_t run = 0; run < up(panels, RUN) / RUN; run++)
            panels_amx(&p, run * RUN, run * RUN + RUN < panels ? run * RUN + RUN : panels);
        release_tiles();
        return;
    }
    panel_t many = isa >= ISA_AVX512 ? many_avx512 : isa >= ISA_AVXVNNI ? many_avxvnni : w->bits == 4 ? many_avx2 : NULL;
    panel_t few = isa >= ISA_AVX512 ? panel_avx512 : panel_avx2;
    panel_t multiply = rows > FEW && many ? many : few;
#pragma omp for schedule(guided) nowait
    for (int64_t panel = 0; panel < panels; panel++) multiply(w, &chunk->codes, rows, panel * PANEL, y, dtype, y_row);
}

int own_memory(int64_t in, int64_t groups) {
    size_t multiplied = sizeof(own_t) > sizeof(unpacked_t) ? sizeof(own_t) : sizeof(unpacked_t);
    multiplied = floating_bytes() > multiplied ? floating_bytes() : multiplied;
    return scratch(SLOT_TILES, multiplied) && scratch(SLOT_ROW, (size_t)(up(in, 2) + 4 * in + 16 * groups) * sizeof(float));
}

INLINE void given_body(const rows_t *from, int64_t row, int64_t in, float *to) {
    int64_t at = (from->first + row) * in;
    if (from->dtype == FLOAT32)
        memcpy(to, (const float *)from->x + at, (size_t)in * sizeof *to);
    else
        for (int64_t j = 0; j < in; j++) to[j] = to_float(from->x, BFLOAT16, at + j);
}

TARGET_AVX512 static void given_avx512(const void *source, int64_t row, int64_t in, float *to) {
    given_body(source, row, in, to);
}

TARGET_AVX2 static void given_avx2(const void *source, int64_t row, int64_t in, float *to) {
    given_body(source, row, in, to);
}

row_t given_rows(int isa) { return isa >= ISA_AVX512 ? given_avx512 : given_avx2; }

/* y_i (rows, out_i) = Q(x R) Ŵ_iᵀ + b_i for x (rows, in) and `count` weights that read it, x and y of element type `dtype`.
 *
 * The weights have the same in, group and bits; in · bits is a multiple of 8, and the bytes of a group divide 64 or are
 * a multiple of it, for AVX2 and AVX-VNNI of 32, unless it is the only one. `isa` is at least ISA_AVX2. Returns 0, or −1 if there was
 * no memory. */
EXPORT int dfrot_linear(int isa, int threads, const void *x, int dtype, int64_t rows, const transform_t *transform,
                        const grid_t *grid, int count, const weights_t *weights, void **y) {
    int64_t in = weights->in, most = chunk_rows(rows);
    uint8_t *memory = scratch(SLOT_CODES, chunk_bytes(weights, most));
    if (!memory) return -1;
    chunk_t chunk = chunk_in(memory, weights, most, *grid, dtype);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    failed |= !own_memory(in, weights->groups);
    if (failed) return -1;
#pragma omp parallel num_threads(threads)
    for (int64_t from = 0; from < rows; from += most) {
        int64_t here = rows - from < most ? rows - from : most;
        rows_t source = {x, dtype, from};
        fill_chunk(isa, &chunk, here, in, given_rows(isa), &source, dtype, transform, *grid);
        for (int i = 0; i < count; i++) multiply_chunk(isa, &chunk, here, weights + i, y[i], dtype, from);
#pragma omp barrier
    }
    return 0;
}

/* y = x R for x (rows, n), both of element type `dtype`. Returns 0, or −1 if there was no memory. */
EXPORT int dfrot_rotate(int isa, int threads, const void *x, void *y, int dtype, int64_t rows, int64_t n,
                        const transform_t *transform) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    failed |= !own_memory(n, 0);
    if (failed) return -1;
    rows_t source = {x, dtype, 0};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float *wide = scratch(SLOT_ROW, 0);
        given_rows(isa)(&source, row, n, wide);
        transform_row(isa, dtype, wide, (double *)(wide + up(n, 2)), n, transform);
        if (dtype == FLOAT32)
            memcpy((float *)y + row * n, wide, (size_t)n * sizeof *wide);
        else
            for (int64_t j = 0; j < n; j++) ((uint16_t *)y)[row * n + j] = to_bfloat16(wide[j]);
    }
    return 0;
}

INLINE void gated_body(const gated_t *from, int64_t row, int64_t in, float *to) {
    int64_t at = row * from->stride;
    if (from->dtype == FLOAT32)
        for (int64_t j = 0; j < in; j++) {
            double gate = ((const float *)from->gate)[at + j];
            to[j] = (float)(gate / (1 + exp_double(-gate))) * ((const float *)from->up)[at + j];
        }
    else
        for (int64_t j = 0; j < in; j++) {
            float gate = to_float(from->gate, BFLOAT16, at + j);
            to[j] = gate / (1 + exp_float(-gate)) * to_float(from->up, BFLOAT16, at + j);
        }
}

TARGET_AVX512 static void gated_avx512(const void *source, int64_t row, int64_t in, float *to) {
    gated_body(source, row, in, to);
}

TARGET_AVX2 static void gated_avx2(const void *source, int64_t row, int64_t in, float *to) {
    gated_body(source, row, in, to);
}

row_t gated_rows(int isa) { return isa >= ISA_AVX512 ? gated_avx512 : gated_avx2; }
