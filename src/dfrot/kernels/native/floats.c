/* y = x Ŵᵀ + b for rows that are not quantized: weights of 2 to 8 bits become floats on the way.
 *
 * For a token and a channel, with weight codes w, and scale t and zero point v by group,
 *
 *     y = Σ_groups t Σ x (w − v)
 *
 * w − v has at most 8 significant bits and t has 8, so both are exact in bfloat16 and their product in float32. A few
 * tokens are multiplied by w − v itself, group by group. For many, rows of weights t (w − v) are made once a chunk
 * and multiplied by tiles: in float32 they are exact, in bfloat16 rounded as the reference rounds them, unless a
 * channel has one t, by which its sums are multiplied afterwards.
 *
 * In streams of bfloat16 products are those of bfloat16 (vdpbf16ps, AMX) where the processor has them, with sums in
 * float32; everything else is float32. Sums of n products are off by at most γ_n = n u / (1 − n u) of the sum of their
 * magnitudes, u = 2⁻²⁴ (Higham, Accuracy and stability of numerical algorithms, 2002, §3.1; for vdpbf16ps, which flushes
 * denormals and rounds every step, and for AMX γ_2n).
 *
 * Inputs are stored in the order in which codes come out of their bytes: position 128 b + 32 j + i of a row is input
 * 128 b + 4 i + j for 4 bits, nibble j of word i of block b; for other widths order is left alone. */
#include "linear.h"

#include <immintrin.h>
#include <string.h>

#pragma GCC optimize("fp-contract=fast") /* a product and a sum may be rounded together */

#define TARGET_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2")))
#define TARGET_TILES                                                                                                   \
    __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi2")))

#define SLAB 4                 /* blocks of a panel's weights that are unpacked together, in bfloat16: 32 KB */
#define RUN 4                  /* panels that pass by the same slab of tokens */
#define PAIRS (BLOCK * SLAB / 2)

/* What a thread multiplies in: weights of a panel, as floats [position][channel], as pairs of bfloat16
 * [pair of positions][channel][2], or as tiles [32 positions][channel][32]; sums; rows of weights before they are
 * transposed. */
typedef struct {
    union {
        float floats[PAIRS][PANEL];
        uint16_t pairs[PAIRS][PANEL][2], tiles[PAIRS / 16][PANEL][32];
    };
    float sums[CHUNK][PANEL];
    float dots[RUN][CHUNK / 32][4][16][16];
    float rows[16][BLOCK];
} floating_t;

size_t floating_bytes(void) { return sizeof(floating_t); }

/* Whether vdpbf16ps is faster than two products in float32: processors with AMX take four times as long for it. −1: not
 * looked yet. Tests set it. */
EXPORT int dfrot_pairs = -1;

static int pairs_pay(void) {
    if (dfrot_pairs < 0) dfrot_pairs = __builtin_cpu_supports("avx512bf16") && !dfrot_has(ISA_AMX);
    return dfrot_pairs;
}

int element_of(int isa, const chunk_t *chunk, int64_t rows) {
    int narrow = tiled(isa, rows) || (isa >= ISA_AVX512 && rows > FEW && pairs_pay());
    return chunk->stream == BFLOAT16 && narrow ? BFLOAT16 : FLOAT32;
}

INLINE void keep_body(int interleaved, int element, const float *x, int64_t in, const chunk_t *chunk, int64_t to) {
    float *wide = (float *)chunk->codes.codes + to * chunk->codes.stride;
    uint16_t *narrow = (uint16_t *)chunk->codes.codes + to * chunk->codes.stride;
    for (int64_t from = 0; from < in; from += BLOCK) {
        float padded[BLOCK], block[BLOCK];
        const float *values = x + from;
        if (in - from < BLOCK) {
            memset(padded, 0, sizeof padded);
            values = memcpy(padded, values, (size_t)(in - from) * sizeof *values);
        }
        for (int i = 0; i < 32; i++)
            for (int j = 0; j < 4; j++) block[interleaved ? 32 * j + i : 4 * i + j] = values[4 * i + j];
        if (element == BFLOAT16)
            for (int i = 0; i < BLOCK; i++) narrow[from + i] = to_bfloat16(block[i]);
        else if (chunk->stream == FLOAT32)
            memcpy(wide + from, block, sizeof block);
        else
            for (int i = 0; i < BLOCK; i++) {
                uint16_t rounded = to_bfloat16(block[i]);
                wide[from + i] = to_float(&rounded, BFLOAT16, 0);
            }
    }
}

TARGET_AVX512 static void keep_avx512(int element, const float *x, int64_t in, const chunk_t *chunk, int64_t to) {
    if (chunk->interleaved)
        keep_body(1, element, x, in, chunk, to);
    else
        keep_body(0, element, x, in, chunk, to);
}

TARGET_AVX2 static void keep_avx2(int element, const float *x, int64_t in, const chunk_t *chunk, int64_t to) {
    keep_body(chunk->interleaved, element, x, in, chunk, to);
}

void keep_row(int isa, int element, const float *x, int64_t in, const chunk_t *chunk, int64_t to) {
    (isa >= ISA_AVX512 ? keep_avx512 : keep_avx2)(element, x, in, chunk, to);
}

/* Sixteen rows of bfloat16 into the order of a right tile, [stride/32][pair 16][token 16][2]. */
TARGET_AVX512 static void tiles_avx512(const chunk_t *chunk, int64_t row) {
    int64_t bytes = 2 * chunk->codes.stride;
    for (int64_t at = 0; at < bytes; at += 64) {
        __m512i v[16];
        for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(chunk->codes.codes + (row + i) * bytes + at);
        transpose(v);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(chunk->tiles + row * bytes + at * 16 + i * 64, v[i]);
    }
}

void keep_tiles(const chunk_t *chunk, int64_t row) { tiles_avx512(chunk, row); }

/* ---- One block of one channel -------------------------------------------------------------------------------------------- */

/* The bytes of a block of a row and eight more. What is beyond the row is of no meaning, its inputs are zeros; beyond the
 * last row there is nothing to read, and `room` for a copy. */
INLINE const uint8_t *bytes_of(const weights_t *w, int64_t channel, int64_t block, uint8_t *room) {
    int64_t size = BLOCK / 8 * w->bits, from = channel * w->bytes + block * size, left = w->out * w->bytes - from;
    if (left >= size + 8) return w->codes + from;
    memset(room, 0, (size_t)size + 8);
    return memcpy(room, w->codes + from, (size_t)(left < size ? left : size));
}

/* 128 codes of so many bits, one byte each. */
#define TARGET_BMI2 __attribute__((target("bmi2")))
TARGET_BMI2 INLINE void spread(const uint8_t *bytes, int bits, uint8_t *codes) {
    uint64_t mask = 0x0101010101010101u * (uint64_t)((1 << bits) - 1);
    for (int i = 0; i < BLOCK / 8; i++) {
        uint64_t eight;
        memcpy(&eight, bytes + i * bits, sizeof eight);
        eight = _pdep_u64(eight, mask);
        memcpy(codes + 8 * i, &eight, sizeof eight);
    }
}

#define BASE 8388608.0f /* 2^23 */

static const float CODES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* 2^23 + v, and t, of the groups of a channel. */
typedef struct {
    float *zero, *scale;
} of_groups_t;

/* Whether a channel has one scale, a block lies in one group, or in several. */
typedef enum { ONE_GROUP, WHOLE_BLOCKS, MIXED_BLOCKS } grouping_t;
INLINE grouping_t grouping_of(const weights_t *w) {
    return w->groups == 1 ? ONE_GROUP : w->group % BLOCK ? MIXED_BLOCKS : WHOLE_BLOCKS;
}

/* A sum over a whole row to y. */
INLINE void store(const weights_t *w, int64_t channel, float sum, void *y, int dtype, int64_t y_row) {
    float value = (w->groups == 1 ? sum * scale_of(w, channel) : sum) + (w->bias ? w->bias[channel] : 0);
    int64_t at = y_row * w->out + channel;
    if (dtype == FLOAT32)
        ((float *)y)[at] = value;
    else
        ((uint16_t *)y)[at] = to_bfloat16(value);
}

TARGET_AVX2 INLINE float sum_avx2(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#define TARGET TARGET_AVX512
#define NAME(name) name##_avx512
#define W 16
#define WORDS(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define BYTES(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define PICK(from, at) ((__m512)_mm512_permutexvar_ps((__m512i)(at), (__m512)(from)))
#define SUM(v) _mm512_reduce_add_ps((__m512)(v))
#define NIBBLE(words, j, table, zero)                                                                                  \
    ((V)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)(words), 4 * (j)), (__m512)(table))) /* has regard for four bits alone */
#include "lanes.h"

#define TARGET TARGET_AVX2
#define NAME(name) name##_avx2
#define W 8
#define WORDS(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define BYTES(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define PICK(from, at) ((__m256)_mm256_permutevar8x32_ps((__m256)(from), (__m256i)(at)))
#define SUM(v) sum_avx2((__m256)(v))
#define NIBBLE(words, j, table, zero) (ABOVE((NAME(ints))(words) >> 4 * (j) & 15) - (zero))
#include "lanes.h"

/* ---- Weights of 4 bits as bfloat16: one look-up for 32 of them ------------------------------------------------------------ */

/* t (c − v) for every code c, twice. */
TARGET_BF16 INLINE __m512i table_of(float zero, float scale) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 values = _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values));
}

/* The nibbles of 32 words, by position, of a block that several groups share, scaled by their t. */
TARGET_BF16 INLINE void look_up_mixed(const weights_t *w, int64_t channel, int64_t block, __m512i words, __m512i to[4]) {
    int64_t group = block * BLOCK / w->group, end = (group + 1) * w->group - block * BLOCK;
    for (int j = 0; j < 4; j++) to[j] = _mm512_setzero_si512();
    for (int64_t at = 0; at < BLOCK && group < w->groups; at = end, end += w->group, group++) {
        int64_t of = channel * w->groups + group;
        __m512i table = table_of((float)zero_of(w, of), scale_of(w, of));
        __mmask32 from = (__mmask32)(0xffffffffull << at / 4);
        to[0] = _mm512_mask_permutexvar_epi16(to[0], from, words, table); /* what is beyond its end is overwritten */
        to[1] = _mm512_mask_permutexvar_epi16(to[1], from, _mm512_srli_epi16(words, 4), table);
        to[2] = _mm512_mask_permutexvar_epi16(to[2], from, _mm512_srli_epi16(words, 8), table);
        to[3] = _mm512_mask_permutexvar_epi16(to[3], from, _mm512_srli_epi16(words, 12), table);
    }
}

TARGET_BF16 INLINE void look_up(__m512i words, __m512i table, __m512i to[4]) {
    to[0] = _mm512_permutexvar_epi16(words, table);
    to[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
    to[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
    to[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
}

TARGET_BF16 INLINE __m512i load_words(const weights_t *w, int64_t channel, int64_t block) {
    int64_t left = w->bytes - block * 64;
    __mmask64 there = left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1;
    return _mm512_maskz_loadu_epi8(there, w->codes + channel * w->bytes + block * 64);
}

/* ---- Many tokens ----------------------------------------------------------------------------------------------------------- */

/* The sums of a panel to y, [token][channel]. */
INLINE void finish_body(const weights_t *w, int64_t rows, int64_t first, const floating_t *own, void *y, int dtype,
                        int64_t y_row) {
    int64_t count = w->out - first < PANEL ? w->out - first : PANEL;
    float scale[PANEL] = {0}, bias[PANEL] = {0};
    for (int64_t c = 0; c < count; c++) {
        scale[c] = w->groups == 1 ? scale_of(w, first + c) : 1;
        if (w->bias) bias[c] = w->bias[first + c];
    }
    for (int64_t row = 0; row < rows; row++) {
        float finished[PANEL];
        int64_t at = (y_row + row) * w->out + first;
        for (int c = 0; c < PANEL; c++) finished[c] = own->sums[row][c] * scale[c] + bias[c];
        if (dtype == FLOAT32) {
            memcpy((float *)y + at, finished, (size_t)count * sizeof(float));
        } else {
            uint16_t narrow[PANEL];
            for (int c = 0; c < PANEL; c++) narrow[c] = to_bfloat16(finished[c]);
            memcpy((uint16_t *)y + at, narrow, (size_t)count * sizeof *narrow);
        }
    }
}

/* Blocks `from` … `until` − 1 of a panel's weights as floats, [position][channel]. */
TARGET_AVX512 static void unpack_avx512(const weights_t *w, int64_t first, int64_t from, int64_t until, floating_t *own) {
    for (int64_t block = from; block < until; block++)
        for (int64_t half = 0; half < PANEL; half += 16) {
            for (int64_t c = 0; c < 16; c++) {
                if (first + half + c < w->out)
                    row_avx512(w, of_groups_avx512(w, first + half + c), first + half + c, block, own->rows[c]);
                else
                    memset(own->rows[c], 0, sizeof own->rows[c]);
            }
            for (int64_t at = 0; at < BLOCK; at += 16) {
                __m512i v[16];
                for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(own->rows[i] + at);
                transpose(v);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(own->floats[(block - from) * BLOCK + at + i] + half, v[i]);
            }
        }
}

TARGET_AVX2 static void unpack_avx2(const weights_t *w, int64_t first, int64_t from, int64_t until, floating_t *own) {
    for (int64_t block = from; block < until; block++)
        for (int64_t c = 0; c < PANEL; c++) {
            float *row = own->rows[0];
            if (first + c < w->out)
                row_avx2(w, of_groups_avx2(w, first + c), first + c, block, row);
            else
                memset(row, 0, sizeof own->rows[0]);
            for (int64_t i = 0; i < BLOCK; i++) own->floats[(block - from) * BLOCK + i][c] = row[i];
        }
}

/* Adds `positions` of them to the sums of a few tokens, or begins these. */
TARGET_AVX512 INLINE void add_floats(int rows, const float (*weights)[PANEL], const float *x, int64_t stride,
                                     int64_t positions, int fresh, float (*to)[PANEL]) {
    __m512 sums[12][2];
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) sums[r][h] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to[r] + 16 * h);
    for (int64_t k = 0; k < positions; k++) {
        __m512 left = _mm512_loadu_ps(weights[k]), right = _mm512_loadu_ps(weights[k] + 16);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            __m512 input = _mm512_set1_ps(x[r * stride + k]);
            sums[r][0] = _mm512_fmadd_ps(left, input, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(right, input, sums[r][1]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(to[r] + 16 * h, sums[r][h]);
}

TARGET_AVX2 INLINE void add_floats_avx2(int rows, const float (*weights)[PANEL], const float *x, int64_t stride,
                                        int64_t positions, int fresh, float (*to)[PANEL]) {
    for (int half = 0; half < PANEL; half += 16) {
        __m256 sums[6][2];
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) sums[r][h] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(to[r] + half + 8 * h);
        for (int64_t k = 0; k < positions; k++) {
            __m256 left = _mm256_loadu_ps(weights[k] + half), right = _mm256_loadu_ps(weights[k] + half + 8);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                __m256 input = _mm256_set1_ps(x[r * stride + k]);
                sums[r][0] = _mm256_fmadd_ps(left, input, sums[r][0]);
                sums[r][1] = _mm256_fmadd_ps(right, input, sums[r][1]);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) _mm256_storeu_ps(to[r] + half + 8 * h, sums[r][h]);
    }
}

#define SLAB_OF(ELEMENT) ((ELEMENT) == BFLOAT16 ? SLAB : SLAB / 2)

/* Slab by slab: the weights are unpacked, and all tokens pass. */
#define MANY(TARGET, NAME, ELEMENT, TYPE, UNPACK, ADD, MOST, WEIGHTS)                                                  \
    TARGET static void NAME(const weights_t *w, const chunk_t *chunk, int64_t rows, int64_t first, void *y, int dtype, \
                            int64_t y_row) {                                                                           \
        floating_t *own = scratch(SLOT_TILES, 0);                                                                      \
        int64_t stride = chunk->codes.stride, blocks = stride / BLOCK;                                                 \
        for (int64_t from = 0, until; from < blocks; from = until) {                                                   \
            until = from + SLAB_OF(ELEMENT) < blocks ? from + SLAB_OF(ELEMENT) : blocks;                               \
            UNPACK(w, first, from, until, own);                                                                        \
            int64_t row = 0;                                                                                           \
            const TYPE *x = (const TYPE *)chunk->codes.codes + from * BLOCK;                                           \
            for (; row + MOST <= rows; row += MOST)                                                                    \
                ADD(MOST, WEIGHTS, x + row * stride, stride, (until - from) * BLOCK, !from, own->sums + row);          \
            for (; row + 4 <= rows; row += 4)                                                                          \
                ADD(4, WEIGHTS, x + row * stride, stride, (until - from) * BLOCK, !from, own->sums + row);             \
            for (; row < rows; row++)                                                                                  \
                ADD(1, WEIGHTS, x + row * stride, stride, (until - from) * BLOCK, !from, own->sums + row);             \
        }                                                                                                              \
        finish_body(w, rows, first, own, y, dtype, y_row);                                                             \
    }

MANY(TARGET_AVX512, many_avx512, FLOAT32, float, unpack_avx512, add_floats, 12, (const float(*)[PANEL])own->floats)
MANY(TARGET_AVX2, many_avx2, FLOAT32, float, unpack_avx2, add_floats_avx2, 6, (const float(*)[PANEL])own->floats)

/* A block of a channel's weights as bfloat16, 32 by 32 positions; zeros for channels beyond the last. */
TARGET_BF16 INLINE void narrow_row(const weights_t *w, int64_t channel, int64_t block, __m512i table, __m512i to[4]) {
    for (int j = 0; j < 4; j++) to[j] = _mm512_setzero_si512();
    if (channel >= w->out) return;
    if (w->bits != 4) {
        float row[BLOCK];
        row_avx512(w, of_groups_avx512(w, channel), channel, block, row);
        for (int j = 0; j < 4; j++)
            to[j] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + 32 * j + 16), _mm512_loadu_ps(row + 32 * j));
    } else if (w->groups == 1) {
        look_up(load_words(w, channel, block), table, to);
    } else if (grouping_of(w) == WHOLE_BLOCKS) {
        int64_t at = channel * w->groups + block * BLOCK / w->group;
        look_up(load_words(w, channel, block), table_of((float)zero_of(w, at), scale_of(w, at)), to);
    } else {
        look_up_mixed(w, channel, block, load_words(w, channel, block), to);
    }
}

TARGET_BF16 INLINE __m512i own_table(const weights_t *w, int64_t channel) {
    return table_of(w->groups == 1 && channel < w->out ? (float)zero_of(w, channel) : 0, 1);
}

TARGET_BF16 static void unpack_pairs(const weights_t *w, int64_t first, int64_t from, int64_t until, floating_t *own) {
    for (int64_t half = 0; half < PANEL; half += 16)
        for (int64_t block = from; block < until; block++) {
            __m512i v[4][16];
            for (int64_t c = 0; c < 16; c++) {
                __m512i row[4];
                narrow_row(w, first + half + c, block, own_table(w, first + half + c), row);
                for (int j = 0; j < 4; j++) v[j][c] = row[j];
            }
            for (int j = 0; j < 4; j++) {
                transpose(v[j]);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(own->pairs[(block - from) * 64 + j * 16 + i][half], v[j][i]);
            }
        }
}

INLINE int32_t two_inputs(const uint16_t *x) {
    int32_t two;
    memcpy(&two, x, sizeof two);
    return two;
}

TARGET_BF16 INLINE void add_pairs(int rows, const uint16_t (*weights)[PANEL][2], const uint16_t *x, int64_t stride,
                                  int64_t positions, int fresh, float (*to)[PANEL]) {
    __m512 sums[12][2];
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) sums[r][h] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to[r] + 16 * h);
    for (int64_t k = 0; k < positions / 2; k++) {
        __m512i left = _mm512_loadu_si512(weights[k]), right = _mm512_loadu_si512(weights[k] + 16);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            __m512i input = _mm512_set1_epi32(two_inputs(x + r * stride + 2 * k));
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], (__m512bh)left, (__m512bh)input);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], (__m512bh)right, (__m512bh)input);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) _mm512_storeu_ps(to[r] + 16 * h, sums[r][h]);
}

MANY(TARGET_BF16, many_bf16, BFLOAT16, uint16_t, unpack_pairs, add_pairs, 12, (const uint16_t(*)[PANEL][2])own->pairs)

/* ---- AMX: 32 channels against 32 tokens in four tiles of float32 ----------------------------------------------------------- */

/* Asks for what is `ahead` bytes further, too. */
TARGET_BF16 static void unpack_tiles(const weights_t *w, int64_t first, int64_t from, int64_t until, int64_t ahead,
                                     floating_t *own) {
    int64_t size = BLOCK / 8 * w->bits;
    for (int64_t c = 0; c < PANEL; c++) {
        __m512i table = own_table(w, first + c);
        for (int64_t block = from; block < until; block++) {
            __m512i row[4];
            uintptr_t next = (uintptr_t)w->codes + (uintptr_t)((first + c) * w->bytes + block * size + ahead);
            for (int64_t line = 0; line < size; line += 64) _mm_prefetch((const char *)next + line, _MM_HINT_T1);
            narrow_row(w, first + c, block, table, row);
            for (int j = 0; j < 4; j++) _mm512_storeu_si512(own->tiles[(block - from) * 4 + j][c], row[j]);
        }
    }
}

/* The sums of sixteen channels and tokens, channels as rows, to y. */
TARGET_BF16 INLINE void store_tile(const weights_t *w, int64_t rows, int64_t token, int64_t channel,
                                   const float (*sums)[16], void *y, int dtype, int64_t y_row) {
    if (token >= rows || channel >= w->out) return;
    int64_t count = w->out - channel < 16 ? w->out - channel : 16;
    __mmask16 there = (__mmask16)((1u << count) - 1);
    __m512 bias = w->bias ? _mm512_maskz_loadu_ps(there, w->bias + channel) : _mm512_setzero_ps();
    float of_channel[16];
    __m512i v[16];
    for (int64_t i = 0; i < 16; i++) {
        of_channel[i] = w->groups == 1 && i < count ? scale_of(w, channel + i) : 1;
        v[i] = _mm512_loadu_si512(sums[i]);
    }
    __m512 scale = _mm512_loadu_ps(of_channel);
    transpose(v);
    for (int64_t i = 0; i < 16 && token + i < rows; i++) {
        __m512 values = _mm512_fmadd_ps(_mm512_castsi512_ps(v[i]), scale, bias);
        int64_t at = (y_row + token + i) * w->out + channel;
        if (dtype == FLOAT32)
            _mm512_mask_storeu_ps((float *)y + at, there, values);
        else
            _mm256_mask_storeu_epi16((uint16_t *)y + at, there, (__m256i)_mm512_cvtneps_pbh(values));
    }
}

/* The sums of a panel of a run and a pair of tiles of tokens, number `which` of them, to y. */
TARGET_BF16 static void store_pair(const weights_t *w, const floating_t *own, int64_t rows, int64_t first, int64_t which,
                                   void *y, int dtype, int64_t y_row) {
    int64_t pairs = up(rows, 32) / 32, panel = which / pairs, pair = which % pairs;
    for (int i = 0; i < 4; i++)
        store_tile(w, rows, pair * 32 + i % 2 * 16, first + panel * PANEL + i / 2 * 16,
                   (const float(*)[16])own->dots[panel][pair][i], y, dtype, y_row);
}

/* A run of panels against a chunk: while they pass, a slab of the tokens stays near. */
TARGET_TILES static void run_amx(const weights_t *w, const chunk_t *chunk, int64_t rows, int64_t first, void *y, int dtype,
                                 int64_t y_row) {
    floating_t *own = scratch(SLOT_TILES, 0);
    int64_t stride = chunk->codes.stride, blocks = stride / BLOCK, pairs = up(rows, 32) / 32;
    int64_t late = -1; /* the sums before are stored while the processor multiplies: these are not ready */
    for (int64_t from = 0, until; from < blocks; from = until) {
        until = from + SLAB < blocks ? from + SLAB : blocks;
        for (int64_t panel = 0; panel < RUN && first + panel * PANEL < w->out; panel++) {
            int64_t last = panel + 1 == RUN || first + (panel + 1) * PANEL >= w->out;
            int64_t ahead = last ? SLAB * BLOCK / 8 * w->bits - panel * PANEL * w->bytes : PANEL * w->bytes;
            unpack_tiles(w, first + panel * PANEL, from, until, ahead, own);
            for (int64_t pair = 0; pair < pairs; pair++) {
                float(*dots)[16][16] = own->dots[panel][pair];
                const int8_t *left = chunk->tiles + pair * 64 * stride + from * 4 * 1024, *right = left + 32 * stride;
                if (from) {
                    _tile_loadd(0, dots[0], 64);
                    _tile_loadd(1, dots[1], 64);
                    _tile_loadd(2, dots[2], 64);
                    _tile_loadd(3, dots[3], 64);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                for (int64_t tile = 0; tile < (until - from) * 4; tile++) {
                    _tile_loadd(4, own->tiles[tile][0], 64);
                    _tile_loadd(6, left + tile * 1024, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, right + tile * 1024, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_loadd(5, own->tiles[tile][16], 64);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, dots[0], 64);
                _tile_stored(1, dots[1], 64);
                _tile_stored(2, dots[2], 64);
                _tile_stored(3, dots[3], 64);
                if (until < blocks) continue;
                if (late >= 0) store_pair(w, own, rows, first, late, y, dtype, y_row);
                late = panel * pairs + pair;
            }
        }
    }
    store_pair(w, own, rows, first, late, y, dtype, y_row);
}

void multiply_floats(int isa, const chunk_t *chunk, int64_t rows, const weights_t *w, void *y, int dtype, int64_t y_row) {
    typedef void (*multiply_t)(const weights_t *, const chunk_t *, int64_t, int64_t, void *, int, int64_t);
    int narrow = element_of(isa, chunk, rows) == BFLOAT16, tiles = narrow && tiled(isa, rows);
    multiply_t multiply = tiles ? run_amx : narrow ? many_bf16 : isa >= ISA_AVX512 ? many_avx512 : many_avx2;
    if (rows <= FEW) multiply = isa >= ISA_AVX512 ? few_avx512 : few_avx2;
    int64_t width = tiles ? RUN * PANEL : PANEL;
    if (tiles) configure_tiles(64);
#pragma omp for schedule(guided) nowait
    for (int64_t at = 0; at < up(w->out, width) / width; at++) multiply(w, chunk, rows, at * width, y, dtype, y_row);
    if (tiles) release_tiles();
}
