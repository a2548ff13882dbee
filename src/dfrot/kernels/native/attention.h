/* Attention over packed keys and values, for all threads of a parallel region together. */
#ifndef DFROT_ATTENTION_H
#define DFROT_ATTENTION_H

#include "cache.h"

#define TOKENS 64 /* of the cache that are unpacked at a time */

/* Attention of some queries over some tokens, so far: the largest score, Σ e^(score − largest), and that sum of values. */
typedef struct {
    double largest, sum;
    double values[]; /* floats, unless the attention is wide */
} part_t;

INLINE part_t *part_of(void *parts, int64_t number, int64_t dim) {
    return (part_t *)((char *)parts + number * (int64_t)(sizeof(part_t) + (size_t)dim * sizeof(double)));
}

/* How the work is cut. Queries are in the order (batch, kv head, query head of it, token), which is that of
 * (batch, head, token); those of one kv head are a group. */
typedef struct {
    int64_t batch, heads, tokens, length, dim;
    int wide;       /* computed in float64, for streams of FLOAT32, as the reference does */
    double scaling; /* of scores */
    const double *more; /* (batch, heads, tokens, length), added to scaled scores; NULL: nothing */
    int64_t groups, rows;  /* rows: queries of a group */
    int64_t splits, span;  /* parts of the cache that are worked on apart, and their tokens */
    int64_t query_floats;  /* that the memory of `attend` begins with: queries times `query_scaling`, channels by `place` */
    int64_t bytes;         /* of that memory */
    int64_t own_bytes;     /* that each thread needs in SLOT_BLOCK */
} plan_t;

plan_t plan_attention(int threads, int dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t length,
                      double scaling, const cache_t *keys);

INLINE float query_scaling(const plan_t *plan) { return plan->wide ? 1 : (float)plan->scaling; }

/* y (batch, tokens, heads, dim) for the queries that `memory` begins with; see dfrot_attend. Waits for all threads. */
void attend(int isa, const plan_t *plan, void *memory, const uint8_t *mask, int64_t mask_batch, int64_t mask_stride,
            const cache_t *keys, const cache_t *values, void *y, int dtype);

#endif
