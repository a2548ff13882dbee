/* Products of quantized rows with packed weights, chunk by chunk, for all threads of a parallel region together. */
#ifndef DFROT_LINEAR_H
#define DFROT_LINEAR_H

#include "dfrot.h"

typedef struct {
    int64_t out, in, group, groups; /* group divides in; groups of a channel */
    int bits;                       /* of a code, 4 or 8 */
    const uint8_t *codes;           /* (out, bytes) */
    int64_t bytes;                  /* of a row */
    const void *scale;              /* (out, groups) of element type scale_dtype */
    int scale_dtype;
    const uint8_t *zero;  /* (out, groups); NULL: 2^(bits − 1) */
    const int32_t *sums;  /* (out, groups): of codes */
    const float *bias;    /* (out), or NULL */
} weights_t;

/* Tokens at most that are worked on together: more would read the weights less often, fewer stay longer in the cache. */
#define CHUNK 192

INLINE int64_t chunk_rows(int64_t rows) { return rows < CHUNK ? up(rows, 32) : CHUNK; }

/* What a chunk's codes are kept in; belongs to the thread that began the parallel region. */
typedef struct {
    codes_t codes;
    int8_t *tiles; /* the same codes in the order of AMX */
} chunk_t;

/* The bytes of a chunk of `most` rows that are to be multiplied with w, and the chunk in memory of so many bytes. */
size_t chunk_bytes(const weights_t *w, int64_t most);
chunk_t chunk_in(uint8_t *memory, const weights_t *w, int64_t most);

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

#endif
