/* Products of quantized rows with packed weights, chunk by chunk, for all threads of a parallel region together. */
#ifndef DFROT_LINEAR_H
#define DFROT_LINEAR_H

#include "dfrot.h"

#include <immintrin.h>

#define FEW 8    /* tokens, up to which dot products beat tiles */
#define PANEL 32 /* channels that are worked on together */

typedef struct {
    int64_t out, in, group, groups; /* group divides in; groups of a channel */
    int bits;                       /* of a code: 4 or 8 beside quantized rows, 2 to 8 beside others */
    const uint8_t *codes;           /* (out, bytes) */
    int64_t bytes;                  /* of a row */
    const void *scale;              /* (out, groups) of element type scale_dtype */
    int scale_dtype;
    const uint8_t *zero;  /* (out, groups); NULL: 2^(bits − 1) */
    const int32_t *sums;  /* (out, groups): of codes; for quantized rows alone */
    const float *bias;    /* (out), or NULL */
} weights_t;

INLINE int32_t zero_of(const weights_t *w, int64_t at) { return w->zero ? w->zero[at] : 1 << (w->bits - 1); }

INLINE float scale_of(const weights_t *w, int64_t at) { return to_float(w->scale, w->scale_dtype, at); }

/* Tokens at most that are worked on together: more would read the weights less often, fewer stay longer in the cache. */
#define CHUNK 192

INLINE int64_t chunk_rows(int64_t rows) { return rows < CHUNK ? up(rows, 32) : CHUNK; }

/* What a chunk is kept in; belongs to the thread that began the parallel region. Rows that are not quantized, `floating`,
 * stand where codes would, as floats of `element_of`, in the order of floats.c. */
typedef struct {
    codes_t codes;
    int8_t *tiles; /* the same codes, or bfloat16s, in the order of AMX */
    int floating, interleaved, stream; /* stream: the element type that unquantized rows are rounded to */
} chunk_t;

/* The bytes of a chunk of `most` rows that are to be multiplied with w, and the chunk in memory of so many bytes, whose
 * rows come from a stream of element type `stream`; they are left as they are if the grid has 16 bits. */
size_t chunk_bytes(const weights_t *w, int64_t most);
chunk_t chunk_in(uint8_t *memory, const weights_t *w, int64_t most, grid_t grid, int stream);

/* The part that floats.c has in what follows: the element type of a chunk of so many unquantized rows, a row to its place,
 * sixteen rows of bfloat16 in the order of AMX, the product, and the memory that a thread needs for it. */
int element_of(int isa, const chunk_t *chunk, int64_t rows);
void keep_row(int isa, int element, const float *x, int64_t in, const chunk_t *chunk, int64_t to);
void keep_tiles(const chunk_t *chunk, int64_t row);
void multiply_floats(int isa, const chunk_t *chunk, int64_t rows, const weights_t *w, void *y, int dtype, int64_t y_row);
size_t floating_bytes(void);

/* The scratch memory that a thread needs for rows of at most `in` inputs in `groups` groups; whether there is some. */
int own_memory(int64_t in, int64_t groups);

/* Brings row `row` of something to `to`, `in` floats. */
typedef void (*row_t)(const void *source, int64_t row, int64_t in, float *to);

/* Fills a chunk with `rows` rows that `row_of` brings, rotated and quantized. Waits for all threads. */
void fill_chunk(int isa, chunk_t *chunk, int64_t rows, int64_t in, row_t row_of, const void *source, int dtype,
                const transform_t *transform, grid_t grid);

/* The product of a chunk with one weight, to rows `y_row` … of y. Does not wait. */
void multiply_chunk(int isa, const chunk_t *chunk, int64_t rows, const weights_t *w, void *y, int dtype, int64_t y_row);

/* Rows of a matrix, from row `first` on. */
typedef struct {
    const void *x;
    int dtype;
    int64_t first;
} rows_t;
row_t given_rows(int isa);

/* silu(gate) · up of rows of element type `dtype` that are `stride` apart. */
typedef struct {
    const void *gate, *up;
    int dtype;
    int64_t stride;
} gated_t;
row_t gated_rows(int isa);

/* 16 × 16 entries of 32 bits: row i of the result is column i of `from`. */
TARGET_AVX512 INLINE void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) { /* v[4 q + i] has columns i, i + 4, … of rows 4 q … 4 q + 3 */
        t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

INLINE int tiled(int isa, int64_t rows) { return isa >= ISA_AMX && rows > FEW; }

/* Tiles 0 … 3 are sums, 4 and 5 weights, 6 and 7 tokens, the products `depth` bytes deep. */
void configure_tiles(int depth);
void release_tiles(void);

#endif
