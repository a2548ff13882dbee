/* A decoder block in two halves around its attention, and with it in one go for a few new tokens over a packed cache.
 * What is handed on inside is float32, but for gate and up, which are of the stream's element type; in streams of FLOAT32
 * what lies between products is computed in float64. */
#include "attention.h"
#include "linear.h"

#include <math.h>
#include <string.h>

typedef struct {
    const void *weight; /* (n), of the element type of the residual stream; NULL: no norm */
    double eps;
} norm_t;

/* Weights, rotations and grids of a block. q, k and v are three weights, or one with their rows one after the other; so
 * are gate and up two or one. */
typedef struct {
    int64_t heads, kv_heads, dim, rotary; /* dim: channels of a head, the first `rotary` of them turned by position */
    norm_t attention_norm, mlp_norm, query_norm, key_norm;
    const weights_t *readers;
    int64_t num_readers;
    const weights_t *output, *gates, *down;
    int64_t num_gates;
    transform_t before_readers, keys, before_output, before_mlp, before_down;
    grid_t readers_grid, output_grid, gates_grid, down_grid, query_grid; /* query_grid.bits 16: queries are left alone */
    int kv_bits;             /* 4 or 8; 16: keys and values are left alone */
    float key_clip, value_clip;
    double scaling;
} block_t;

/* New tokens of some sequences: x (batch, tokens, width) of element type `dtype`; cos and sin (batch, tokens, rotary). */
typedef struct {
    const void *x;
    int64_t dtype, batch, tokens;
    const void *cos, *sin;
} tokens_t;

INLINE void normalize(float *x, int64_t n, norm_t norm, int dtype) {
    if (!norm.weight) return;
    if (dtype == FLOAT32) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) sum += (double)x[j] * x[j];
        double shrink = 1 / sqrt(sum / (double)n + norm.eps);
        for (int64_t j = 0; j < n; j++) x[j] = (float)(x[j] * shrink * ((const float *)norm.weight)[j]);
    } else {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) sum += x[j] * x[j];
        float shrink = 1 / sqrtf(sum / (float)n + (float)norm.eps);
        for (int64_t j = 0; j < n; j++) x[j] *= shrink * to_float(norm.weight, BFLOAT16, j);
    }
}

INLINE void store_row(const float *from, int64_t n, void *to, int dtype, int64_t row) {
    if (dtype == FLOAT32)
        memcpy((float *)to + row * n, from, (size_t)n * sizeof *from);
    else
        for (int64_t j = 0; j < n; j++) ((uint16_t *)to)[row * n + j] = to_bfloat16(from[j]);
}

/* x + more to a row of y; x is overwritten. */
INLINE void sum_body(float *x, const float *more, int64_t n, void *y, int dtype, int64_t row) {
    for (int64_t j = 0; j < n; j++) x[j] += more[j];
    store_row(x, n, y, dtype, row);
}

TARGET_AVX512 static void sum_avx512(float *x, const float *more, int64_t n, void *y, int dtype, int64_t row) {
    sum_body(x, more, n, y, dtype, row);
}

TARGET_AVX2 static void sum_avx2(float *x, const float *more, int64_t n, void *y, int dtype, int64_t row) {
    sum_body(x, more, n, y, dtype, row);
}

/* Rows of the residual stream from `first` on, to which `more` is added if there is some, normalized; the sums are kept
 * in `sums` unless that is NULL. */
typedef struct {
    const void *x;
    int dtype;
    int64_t first;
    const float *more;
    float *sums;
    norm_t norm;
} stream_t;

INLINE void normalized_body(const stream_t *from, int64_t row, int64_t n, float *to) {
    for (int64_t j = 0; j < n; j++) to[j] = to_float(from->x, from->dtype, (from->first + row) * n + j);
    if (from->more)
        for (int64_t j = 0; j < n; j++) to[j] += from->more[row * n + j];
    if (from->sums) memcpy(from->sums + row * n, to, (size_t)n * sizeof *to);
    normalize(to, n, from->norm, from->dtype);
}

TARGET_AVX512 static void normalized_avx512(const void *source, int64_t row, int64_t n, float *to) {
    normalized_body(source, row, n, to);
}

TARGET_AVX2 static void normalized_avx2(const void *source, int64_t row, int64_t n, float *to) {
    normalized_body(source, row, n, to);
}

INLINE row_t normalized_rows(int isa) { return isa >= ISA_AVX512 ? normalized_avx512 : normalized_avx2; }

/* One head of one token: normalized, and turned by position; the halves of the turned channels are the coordinates of
 * planes. */
INLINE void turn_head(const block_t *block, const tokens_t *in, int64_t row, const float *from, norm_t norm, float *to) {
    int64_t half = block->rotary / 2, at = row * block->rotary;
    float x[MOST_CHANNELS];
    memcpy(x, from, (size_t)block->dim * sizeof *x);
    normalize(x, block->dim, norm, (int)in->dtype);
    for (int64_t j = 0; j < half; j++) {
        float c = to_float(in->cos, (int)in->dtype, at + j), s = to_float(in->sin, (int)in->dtype, at + j);
        float d = to_float(in->cos, (int)in->dtype, at + half + j), t = to_float(in->sin, (int)in->dtype, at + half + j);
        to[j] = x[j] * c - x[half + j] * s;
        to[half + j] = x[half + j] * d + x[j] * t;
    }
    memcpy(to + 2 * half, x + 2 * half, (size_t)(block->dim - 2 * half) * sizeof *to);
}

/* Where queries, keys and values go. */
typedef struct {
    const cache_t *keys, *values; /* NULL: nowhere */
    int64_t length;               /* tokens of the cache before */
    float *queries;               /* for `attend`, */
    float query_scaling;          /* so scaled */
    void *q, *k, *v;              /* or all of them as torch has them, (batch, heads, tokens, dim) */
} sinks_t;

/* Keys or values of one token, which the sinks keep as integers, or leave alone. */
INLINE void keep_head(int isa, const block_t *block, const tokens_t *in, const cache_t *cache, float clip, int64_t length,
                      void *dense, float *x, int64_t row, int64_t head) {
    int64_t sequence = row / in->tokens, token = row % in->tokens, at = 0;
    uint8_t codes[MOST_CHANNELS], zero;
    uint16_t scale;
    cache_t own = {codes, &scale, &zero, 1, 1, block->dim, block->kv_bits};
    if (cache)
        at = (sequence * block->kv_heads + head) * cache->capacity + length + token;
    else
        cache = &own;
    if (block->kv_bits < 16) pack_token(isa, x, clip, cache, at);
    if (!dense) return;
    float restored[MOST_CHANNELS];
    if (block->kv_bits < 16) {
        unpack_tokens(cache, at, 1, restored);
        for (int64_t j = 0; j < block->dim; j++) x[j] = restored[place(cache, j)];
    }
    store_row(x, block->dim, dense, (int)in->dtype, (sequence * block->kv_heads + head) * in->tokens + token);
}

/* What one head of one token becomes. `starts` and `strides`: where q, k and v of the chunk that begins with row `first`
 * are. */
INLINE void head_body(int isa, const block_t *block, const tokens_t *in, const sinks_t *out, const float *const starts[3],
                      const int64_t strides[3], int64_t first, int64_t here, int64_t head) {
    int64_t kind = head < block->heads ? 0 : head < block->heads + block->kv_heads ? 1 : 2, row = first + here;
    int64_t own = kind == 0 ? head : kind == 1 ? head - block->heads : head - block->heads - block->kv_heads;
    float x[MOST_CHANNELS];
    double spare[2 * MOST_CHANNELS];
    const float *from = starts[kind] + here * strides[kind] + own * block->dim;
    if (kind == 2) {
        memcpy(x, from, (size_t)block->dim * sizeof *x);
        keep_head(isa, block, in, out->values, block->value_clip, out->length, out->v, x, row, own);
        return;
    }
    turn_head(block, in, row, from, kind ? block->key_norm : block->query_norm, x);
    transform_row(isa, (int)in->dtype, x, spare, block->dim, &block->keys);
    if (kind == 1) {
        keep_head(isa, block, in, out->keys, block->key_clip, out->length, out->k, x, row, own);
        return;
    }
    if (block->query_grid.bits < 16) fake_quantize_row(x, block->dim, block->query_grid);
    int64_t at = (row / in->tokens * block->heads + own) * in->tokens + row % in->tokens;
    if (out->queries)
        for (int64_t j = 0; j < block->dim; j++)
            out->queries[at * block->dim + place(out->keys, j)] = x[j] * out->query_scaling;
    else
        store_row(x, block->dim, out->q, (int)in->dtype, at);
}

TARGET_AVX512 static void head_avx512(int isa, const block_t *block, const tokens_t *in, const sinks_t *out,
                                      const float *const starts[3], const int64_t strides[3], int64_t first,
                                      int64_t here, int64_t head) {
    head_body(isa, block, in, out, starts, strides, first, here, head);
}

TARGET_AVX2 static void head_avx2(int isa, const block_t *block, const tokens_t *in, const sinks_t *out,
                                  const float *const starts[3], const int64_t strides[3], int64_t first, int64_t here,
                                  int64_t head) {
    head_body(isa, block, in, out, starts, strides, first, here, head);
}

/* Memory for both halves, chunk by chunk; belongs to the thread that began the parallel region. */
typedef struct {
    int64_t most; /* tokens of a chunk */
    uint8_t *codes;
    float *stream, *added, *projected;
    uint8_t *hidden; /* of the element type of the stream */
} memory_t;

/* That memory, and each thread's own; 0 if there is none. */
static int get_memory(const block_t *block, int threads, int64_t rows, int64_t own_bytes, memory_t *memory) {
    const weights_t *inputs[4] = {block->readers, block->output, block->gates, block->down};
    int64_t width = block->readers->in, inner = block->down->in, widest = 0, groups = 0;
    int64_t all_heads = block->heads + 2 * block->kv_heads;
    for (int i = 0; i < 4; i++) {
        widest = inputs[i]->in > widest ? inputs[i]->in : widest;
        groups = inputs[i]->groups > groups ? inputs[i]->groups : groups;
    }
    memory->most = chunk_rows(rows);
    size_t bytes = 0;
    for (int i = 0; i < 4; i++) {
        size_t needed = chunk_bytes(inputs[i], memory->most);
        bytes = needed > bytes ? needed : bytes; /* the four follow one another */
    }
    int64_t floats = memory->most * (2 * width + (all_heads * block->dim > 2 * inner ? all_heads * block->dim : 2 * inner));
    memory->codes = scratch(SLOT_CODES, bytes);
    memory->stream = scratch(SLOT_HIDDEN, (size_t)floats * sizeof(float));
    if (!memory->codes || !memory->stream) return 0;
    memory->added = memory->stream + memory->most * width;
    memory->projected = memory->added + memory->most * width;
    memory->hidden = (uint8_t *)memory->projected; /* one after the other, too */
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    failed |= !own_memory(widest, groups) || (own_bytes && !scratch(SLOT_BLOCK, (size_t)own_bytes));
    return !failed;
}

/* From the residual stream to queries, keys and values; for all threads of a parallel region together. */
static void read_half(int isa, const block_t *block, const tokens_t *in, const sinks_t *out, const memory_t *memory) {
    int64_t rows = in->batch * in->tokens, all_heads = block->heads + 2 * block->kv_heads, dim = block->dim;
    chunk_t chunk = chunk_in(memory->codes, block->readers, memory->most, block->readers_grid, (int)in->dtype);
    for (int64_t first = 0; first < rows; first += memory->most) {
        int64_t here = rows - first < memory->most ? rows - first : memory->most;
        const float *starts[3] = {memory->projected, memory->projected + here * block->heads * dim,
                                  memory->projected + here * (block->heads + block->kv_heads) * dim};
        int64_t strides[3] = {block->heads * dim, block->kv_heads * dim, block->kv_heads * dim};
        if (block->num_readers == 1)
            for (int i = 0; i < 3; i++) {
                strides[i] = all_heads * dim;
                starts[i] = memory->projected + (i ? block->heads + (i - 1) * block->kv_heads : 0) * dim;
            }
        stream_t stream = {in->x, (int)in->dtype, first, NULL, NULL, block->attention_norm};
        fill_chunk(isa, &chunk, here, block->readers->in, normalized_rows(isa), &stream, (int)in->dtype,
                   &block->before_readers, block->readers_grid);
        for (int64_t i = 0; i < block->num_readers; i++)
            multiply_chunk(isa, &chunk, here, block->readers + i, (float *)starts[i], FLOAT32, 0);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t at = 0; at < here * all_heads; at++)
            (isa >= ISA_AVX512 ? head_avx512 : head_avx2)(isa, block, in, out, starts, strides, first, at / all_heads,
                                                          at % all_heads);
    }
}

/* From the heads' outputs, attended (rows, heads · dim) of element type attended_dtype, to the residual stream y. */
static void write_half(int isa, const block_t *block, const void *x, int dtype, int64_t rows, const void *attended,
                       int attended_dtype, const memory_t *memory, void *y) {
    const weights_t *output = block->output, *gates = block->gates, *down = block->down;
    int64_t width = block->readers->in, inner = down->in;
    for (int64_t first = 0; first < rows; first += memory->most) {
        int64_t here = rows - first < memory->most ? rows - first : memory->most;
        chunk_t chunk = chunk_in(memory->codes, output, memory->most, block->output_grid, dtype);
        rows_t heads = {attended, attended_dtype, first};
        fill_chunk(isa, &chunk, here, output->in, given_rows(isa), &heads, dtype, &block->before_output, block->output_grid);
        multiply_chunk(isa, &chunk, here, output, memory->added, FLOAT32, 0);
#pragma omp barrier
        chunk = chunk_in(memory->codes, gates, memory->most, block->gates_grid, dtype);
        stream_t stream = {x, dtype, first, memory->added, memory->stream, block->mlp_norm};
        fill_chunk(isa, &chunk, here, width, normalized_rows(isa), &stream, dtype, &block->before_mlp, block->gates_grid);
        void *of_up = memory->hidden + (block->num_gates == 2 ? here : 1) * inner * size_of(dtype);
        multiply_chunk(isa, &chunk, here, gates, memory->hidden, dtype, 0);
        if (block->num_gates == 2) multiply_chunk(isa, &chunk, here, gates + 1, of_up, dtype, 0);
#pragma omp barrier
        chunk = chunk_in(memory->codes, down, memory->most, block->down_grid, dtype);
        gated_t gated = {memory->hidden, of_up, dtype, 2 * inner / block->num_gates};
        fill_chunk(isa, &chunk, here, inner, gated_rows(isa), &gated, dtype, &block->before_down, block->down_grid);
        multiply_chunk(isa, &chunk, here, down, memory->added, FLOAT32, 0);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < here; row++)
            (isa >= ISA_AVX512 ? sum_avx512 : sum_avx2)(memory->stream + row * width, memory->added + row * width, width, y,
                                                        dtype, first + row);
    }
}

/* Queries, keys and values of new tokens to q, k and v, (batch, heads, tokens, dim) of their element type: queries and
 * keys turned by position and rotated, and what is to be quantized quantized. Keys and values go into the caches too, after
 * `length` tokens, unless those are NULL. Returns 0, or −1 if there was no memory. */
EXPORT int dfrot_block_read(int isa, int threads, const block_t *block, const tokens_t *in, const cache_t *keys,
                            const cache_t *values, int64_t length, void *q, void *k, void *v) {
    memory_t memory;
    if (!get_memory(block, threads, in->batch * in->tokens, 0, &memory)) return -1;
    sinks_t out = {keys, values, length, NULL, 1, q, k, v};
#pragma omp parallel num_threads(threads)
    read_half(isa, block, in, &out, &memory);
    return 0;
}

/* y (rows, width) = the block's output for x, given its heads' outputs (rows, heads · dim); all of element type `dtype`.
 * Returns 0, or −1 if there was no memory. */
EXPORT int dfrot_block_write(int isa, int threads, const block_t *block, const void *x, const void *attended, int dtype,
                             int64_t rows, void *y) {
    memory_t memory;
    if (!get_memory(block, threads, rows, 0, &memory)) return -1;
#pragma omp parallel num_threads(threads)
    write_half(isa, block, x, dtype, rows, attended, dtype, &memory, y);
    return 0;
}

/* Both, and attention in between over the caches' `length` tokens and the new ones; mask as for dfrot_attend. For few
 * tokens. Returns 0, or −1 if there was no memory, before anything is written. */
EXPORT int dfrot_block(int isa, int threads, const block_t *block, const tokens_t *in, const cache_t *keys,
                       const cache_t *values, int64_t length, const uint8_t *mask, int64_t mask_batch,
                       int64_t mask_stride, void *y) {
    int64_t rows = in->batch * in->tokens, attended_bytes = rows * block->heads * block->dim * 4;
    plan_t plan = plan_attention(threads, (int)in->dtype, in->batch, block->heads, in->tokens, length + in->tokens,
                                 block->scaling, keys);
    memory_t memory;
    float *attention = scratch(SLOT_PARTS, (size_t)(plan.bytes + attended_bytes));
    if (!attention || !get_memory(block, threads, rows, plan.own_bytes, &memory)) return -1;
    void *attended = (char *)attention + plan.bytes;
    sinks_t out = {keys, values, length, attention, query_scaling(&plan), NULL, NULL, NULL};
#pragma omp parallel num_threads(threads)
    {
        read_half(isa, block, in, &out, &memory);
        attend(isa, &plan, attention, mask, mask_batch, mask_stride, keys, values, attended, FLOAT32);
        write_half(isa, block, in->x, (int)in->dtype, rows, attended, FLOAT32, &memory, y);
    }
    return 0;
}
