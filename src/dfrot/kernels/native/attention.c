/* Attention of a few new tokens over packed keys and values: flash attention over blocks of the cache that are unpacked
 * in the nearest cache, once for all query heads that read them. */
#include "attention.h"

#include <math.h>
#include <string.h>

#pragma GCC optimize("fp-contract=fast") /* a product and a sum may be rounded together */

/* The sum of the lanes. */
INLINE float total(lanes_t x) {
    typedef int32_t index_t __attribute__((vector_size(LANES * sizeof(int32_t))));
    const index_t lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int half = LANES / 2; half; half /= 2) x += __builtin_shuffle(x, lane ^ half);
    return x[0];
}

/* The products of a query with `tokens` keys. */
INLINE void score(int tokens, const float *query, const float *keys, int64_t dim, float *scores) {
    lanes_t sums[4] = {{0}};
    for (int64_t j = 0; j < dim; j += LANES)
        for (int t = 0; t < tokens; t++) sums[t] += LOAD(query + j) * LOAD(keys + t * dim + j);
    for (int t = 0; t < tokens; t++) scores[t] = total(sums[t]);
}

/* Adds `count` values, so weighted, to what a query has so far, in `vectors` · LANES neighbouring channels. */
INLINE void add_values(int vectors, const float *weights, const float *values, int64_t count, int64_t dim, float *so_far) {
    lanes_t sums[8];
    for (int v = 0; v < vectors; v++) sums[v] = LOAD(so_far + v * LANES);
    for (int64_t t = 0; t < count; t++)
        for (int v = 0; v < vectors; v++) sums[v] += weights[t] * LOAD(values + t * dim + v * LANES);
    for (int v = 0; v < vectors; v++) STORE(so_far + v * LANES, sums[v]);
}

/* Queries (rows, dim), channels by `place` and scaled, over tokens `from` … `to` − 1 of a head of the cache that begins
 * at `head`. mask (tokens of all queries, stride) says with 1 where they look; NULL everywhere.
 * more (rows, length) is added to scores; NULL: nothing is. */
INLINE void attend_part(const float *queries, int64_t rows, int64_t queries_per_head, const uint8_t *mask,
                        int64_t mask_stride, const double *more, int64_t length, const cache_t *keys,
                        const cache_t *values, int64_t head, int64_t from, int64_t to, float *block, void *parts,
                        int64_t first_part) {
    int64_t dim = keys->dim;
    float *scores = block + TOKENS * dim;
    for (; from < to; from += TOKENS) {
        int64_t count = to - from < TOKENS ? to - from : TOKENS;
        unpack_tokens(keys, head + from, count, block);
        for (int64_t r = 0; r < rows; r++) {
            part_t *part = part_of(parts, first_part + r, dim);
            float *so_far = (float *)part->values, *of_row = scores + r * TOKENS, largest = (float)part->largest;
            int64_t scored = 0;
            for (; scored + 4 <= count; scored += 4) score(4, queries + r * dim, block + scored * dim, dim, of_row + scored);
            for (; scored < count; scored++) score(1, queries + r * dim, block + scored * dim, dim, of_row + scored);
            if (more)
                for (int64_t t = 0; t < count; t++) of_row[t] += (float)more[r * length + from + t];
            if (mask)
                for (int64_t t = 0; t < count; t++)
                    if (!mask[r % queries_per_head * mask_stride + from + t]) of_row[t] = -INFINITY;
            for (int64_t t = 0; t < count; t++)
                largest = of_row[t] > largest || of_row[t] != of_row[t] ? of_row[t] : largest;
            float shrink = part->largest == -INFINITY ? 0 : exp_float((float)part->largest - largest), sum = 0;
            for (int64_t t = 0; t < count; t++) of_row[t] = of_row[t] == -INFINITY ? 0 : exp_float(of_row[t] - largest);
#pragma omp simd reduction(+ : sum)
            for (int64_t t = 0; t < count; t++) sum += of_row[t];
            part->sum = part->sum * shrink + sum;
            for (int64_t j = 0; j < dim; j++) so_far[j] *= shrink;
            part->largest = largest;
        }
        unpack_tokens(values, head + from, count, block);
        for (int64_t r = 0; r < rows; r++) {
            part_t *part = part_of(parts, first_part + r, dim);
            float *so_far = (float *)part->values;
            const float *of_row = scores + r * TOKENS;
            int64_t j = 0;
            for (; j + 8 * LANES <= dim; j += 8 * LANES) add_values(8, of_row, block + j, count, dim, so_far + j);
            for (; j < dim; j += 2 * LANES) add_values(2, of_row, block + j, count, dim, so_far + j);
        }
    }
}

/* The same in float64; queries are not scaled. */
INLINE void attend_wide(const float *queries, int64_t rows, int64_t queries_per_head, double scaling, const uint8_t *mask,
                        int64_t mask_stride, const double *more, int64_t length, const cache_t *keys,
                        const cache_t *values, int64_t head, int64_t from, int64_t to, float *block, void *parts,
                        int64_t first_part) {
    int64_t dim = keys->dim;
    double *scores = (double *)(block + TOKENS * dim);
    for (; from < to; from += TOKENS) {
        int64_t count = to - from < TOKENS ? to - from : TOKENS;
        unpack_tokens(keys, head + from, count, block);
        for (int64_t r = 0; r < rows; r++) {
            part_t *part = part_of(parts, first_part + r, dim);
            double *of_row = scores + r * TOKENS, largest = part->largest;
            for (int64_t t = 0; t < count; t++) {
                double score = 0;
#pragma omp simd reduction(+ : score)
                for (int64_t j = 0; j < dim; j++) score += (double)queries[r * dim + j] * block[t * dim + j];
                score = score * scaling + (more ? more[r * length + from + t] : 0);
                if (mask && !mask[r % queries_per_head * mask_stride + from + t]) score = -INFINITY;
                of_row[t] = score;
                largest = score > largest || score != score ? score : largest;
            }
            double shrink = part->largest == -INFINITY ? 0 : exp_double(part->largest - largest), sum = 0;
            for (int64_t t = 0; t < count; t++) {
                of_row[t] = of_row[t] == -INFINITY ? 0 : exp_double(of_row[t] - largest);
                sum += of_row[t];
            }
            part->sum = part->sum * shrink + sum;
            for (int64_t j = 0; j < dim; j++) part->values[j] *= shrink;
            part->largest = largest;
        }
        unpack_tokens(values, head + from, count, block);
        for (int64_t r = 0; r < rows; r++) {
            part_t *part = part_of(parts, first_part + r, dim);
            for (int64_t t = 0; t < count; t++) {
                double share = scores[r * TOKENS + t];
                for (int64_t j = 0; j < dim; j++) part->values[j] += share * block[t * dim + j];
            }
        }
    }
}

/* A span of the cache, from token `from` on, for the queries of one group. */
INLINE void attend_span(const plan_t *plan, const float *queries, int64_t group, int64_t from, const uint8_t *mask,
                        int64_t mask_stride, const cache_t *keys, const cache_t *values, void *parts, int64_t first) {
    int64_t head = group * keys->capacity, to = from + plan->span < plan->length ? from + plan->span : plan->length;
    const double *more = plan->more ? plan->more + group * plan->rows * plan->length : NULL;
    queries += group * plan->rows * plan->dim;
    float *block = scratch(SLOT_BLOCK, 0);
    for (int64_t r = 0; r < plan->rows; r++) {
        part_t *part = part_of(parts, first + r, plan->dim);
        part->largest = -INFINITY, part->sum = 0;
        memset(part->values, 0, (size_t)plan->dim * sizeof(double));
    }
    if (plan->wide)
        attend_wide(queries, plan->rows, plan->tokens, plan->scaling, mask, mask_stride, more, plan->length, keys, values,
                    head, from, to, block, parts, first);
    else
        attend_part(queries, plan->rows, plan->tokens, mask, mask_stride, more, plan->length, keys, values, head, from, to,
                    block, parts, first);
}

TARGET_AVX512 static void span_avx512(const plan_t *plan, const float *queries, int64_t group, int64_t from,
                                      const uint8_t *mask, int64_t mask_stride, const cache_t *keys,
                                      const cache_t *values, void *parts, int64_t first) {
    attend_span(plan, queries, group, from, mask, mask_stride, keys, values, parts, first);
}

TARGET_AVX2 static void span_avx2(const plan_t *plan, const float *queries, int64_t group, int64_t from,
                                  const uint8_t *mask, int64_t mask_stride, const cache_t *keys, const cache_t *values,
                                  void *parts, int64_t first) {
    attend_span(plan, queries, group, from, mask, mask_stride, keys, values, parts, first);
}

/* One query, rotated, scaled, channels by `place`. */
TARGET_AVX2 static void prepare_query(int isa, const void *x, int dtype, int64_t row, const transform_t *transform,
                                      float scaling, const cache_t *keys, float *to) {
    float wide[MOST_CHANNELS];
    double spare[2 * MOST_CHANNELS];
    for (int64_t j = 0; j < keys->dim; j++) wide[j] = to_float(x, dtype, row * keys->dim + j);
    transform_row(isa, dtype, wide, spare, keys->dim, transform);
    for (int64_t j = 0; j < keys->dim; j++) to[place(keys, j)] = wide[j] * scaling;
}

/* The parts of one query, `count` of them `apart`, to y. */
static void merge_parts(const plan_t *plan, void *parts, int64_t first, int64_t apart, int64_t count,
                        const cache_t *values, void *y, int dtype, int64_t y_row) {
    int64_t dim = values->dim;
    double largest = -INFINITY, sum = 0, merged[MOST_CHANNELS] = {0};
    for (int64_t i = 0; i < count; i++) {
        double here = part_of(parts, first + i * apart, dim)->largest;
        largest = here > largest || here != here ? here : largest;
    }
    for (int64_t i = 0; i < count; i++) {
        const part_t *part = part_of(parts, first + i * apart, dim);
        const float *narrow = (const float *)part->values;
        if (part->largest == -INFINITY) continue;
        double share = exp_double(part->largest - largest);
        sum += part->sum * share;
        for (int64_t j = 0; j < dim; j++) merged[j] += (plan->wide ? part->values[j] : narrow[j]) * share;
    }
    for (int64_t j = 0; j < dim; j++) {
        float value = sum == 0 ? 0 : (float)(merged[place(values, j)] / sum);
        if (dtype == FLOAT32)
            ((float *)y)[y_row * dim + j] = value;
        else
            ((uint16_t *)y)[y_row * dim + j] = to_bfloat16(value);
    }
}

plan_t plan_attention(int threads, int dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t length,
                      double scaling, const cache_t *keys) {
    plan_t plan = {.batch = batch, .heads = heads, .tokens = tokens, .length = length, .dim = keys->dim};
    plan.wide = dtype == FLOAT32, plan.scaling = scaling;
    plan.groups = batch * keys->heads, plan.rows = heads / keys->heads * tokens;
    int64_t blocks = up(length, TOKENS) / TOKENS, most = (blocks + 3) / 4; /* splits of four blocks at least */
    plan.splits = up(4 * threads, plan.groups) / plan.groups;
    plan.splits = plan.splits > most ? most : plan.splits;
    plan.span = up(blocks, plan.splits) / plan.splits * TOKENS;
    plan.query_floats = up(plan.groups * plan.rows * plan.dim, 2);
    plan.bytes = plan.query_floats * 4 + plan.groups * plan.rows * plan.splits * (int64_t)(sizeof(part_t) + (size_t)plan.dim * 8);
    plan.own_bytes = TOKENS * (plan.dim * 4 + plan.rows * 8);
    return plan;
}

void attend(int isa, const plan_t *plan, void *memory, const uint8_t *mask, int64_t mask_batch, int64_t mask_stride,
            const cache_t *keys, const cache_t *values, void *y, int dtype) {
    const float *queries = memory;
    void *parts = (float *)memory + plan->query_floats;
    int64_t rows = plan->rows;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < plan->groups * plan->splits; task++) {
        int64_t group = task / plan->splits;
        const uint8_t *looks = mask ? mask + group / keys->heads * mask_batch : NULL;
        (isa >= ISA_AVX512 ? span_avx512 : span_avx2)(plan, queries, group, task % plan->splits * plan->span, looks,
                                                      mask_stride, keys, values, parts, task * rows);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < plan->groups * rows; row++) {
        int64_t group = row / rows, head = row / plan->tokens % plan->heads, sequence = row / (plan->heads * plan->tokens);
        merge_parts(plan, parts, group * plan->splits * rows + row % rows, rows, plan->splits, values, y, dtype,
                    (sequence * plan->tokens + row % plan->tokens) * plan->heads + head);
    }
}

/* y (batch, tokens, heads, dim) = softmax(scaling · (q R) kᵀ + more) v over the first `length` tokens of the cache, for
 * q (batch, heads, tokens, dim) of element type `dtype`, as y.
 *
 * `heads` is a multiple of the cache's; dim is a multiple of 32 and at most MOST_CHANNELS. mask (batch, tokens, length),
 * its rows `mask_stride` and its batches `mask_batch` apart, says with 1 where a query looks; NULL: everywhere.
 * more (batch, heads, tokens, length) is added to scores; NULL: nothing is.
 * Returns 0, or −1 if there was no memory. */
EXPORT int dfrot_attend(int isa, int threads, const void *q, int dtype, int64_t batch, int64_t heads, int64_t tokens,
                        int64_t length, const transform_t *transform, double scaling, const uint8_t *mask,
                        int64_t mask_batch, int64_t mask_stride, const double *more, const cache_t *keys,
                        const cache_t *values, void *y) {
    plan_t plan = plan_attention(threads, dtype, batch, heads, tokens, length, scaling, keys);
    plan.more = more;
    float *memory = scratch(SLOT_PARTS, (size_t)plan.bytes);
    if (!memory) return -1;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    failed |= !scratch(SLOT_BLOCK, (size_t)plan.own_bytes);
    if (failed) return -1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < plan.groups * plan.rows; row++)
            prepare_query(isa, q, dtype, row, transform, query_scaling(&plan), keys, memory + row * plan.dim);
        attend(isa, &plan, memory, mask, mask_batch, mask_stride, keys, values, y, dtype);
    }
    return 0;
}
