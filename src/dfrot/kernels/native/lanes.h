/* Weights as floats, and a few tokens against one channel, for vectors of W floats. Included by floats.c once for every
 * instruction set, which defines TARGET, NAME(of a function), W; WORDS(p) and BYTES(p), W words or bytes from p as integers
 * of 32 bits; PICK(from, at), entries `at` of a vector; SUM(v), of its entries; and NIBBLE(words, j, table, zero), w − v for nibble j of words, from
 * `table`, which has it for the first W codes, or by `zero`, 2^23 + v. */

typedef float NAME(floats) __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * W)));
#define V NAME(floats)
#define AT(p) (*(V *)(p))
#define FROM(p) (*(const V *)(p))
#define EVERY(value) ((value) - (V){0})
/* 2^23 + code, for codes below 2^23. */
#define ABOVE(codes) ((V)((codes) | 0x4b000000))
#define BYTE(p, zero) (ABOVE((NAME(ints))BYTES(p)) - (zero))

/* 2^23 + v, and t, of every group of a channel, in memory of its own; what follows them is of no meaning. */
TARGET INLINE of_groups_t NAME(of_groups)(const weights_t *w, int64_t channel) {
    float *zero = scratch(SLOT_ROW, 0), *scale = zero + w->groups + W;
    for (int64_t g = 0; g < w->groups; g++) {
        zero[g] = BASE + (float)zero_of(w, channel * w->groups + g);
        scale[g] = scale_of(w, channel * w->groups + g);
    }
    return (of_groups_t){zero, scale};
}

/* The group of every lane, counted from that of the first. */
TARGET INLINE NAME(ints) NAME(groups)(const weights_t *w, int unit) {
    int32_t at[W];
    NAME(ints) lanes;
    for (int i = 0; i < W; i++) at[i] = (int32_t)(i * unit / w->group);
    memcpy(&lanes, at, sizeof lanes);
    return lanes;
}

/* A channel of a few tokens. Its row follows that of the channel before: memory is read from front to back. */
TARGET INLINE void NAME(channel)(int interleaved, grouping_t grouping, int rows, const weights_t *w, const chunk_t *chunk,
                                 int64_t row, int64_t channel, void *y, int dtype, int64_t y_row) {
    int64_t stride = chunk->codes.stride, group = 0;
    int shift = grouping == MIXED_BLOCKS ? __builtin_ctz((unsigned)w->group) : 0, unit = interleaved ? 4 : 1;
    uint8_t room[BLOCK + 8], codes[BLOCK];
    of_groups_t of = grouping == ONE_GROUP ? (of_groups_t){0} : NAME(of_groups)(w, channel);
    NAME(ints) lanes = NAME(groups)(w, unit);
    V zero = EVERY(BASE + (float)zero_of(w, channel * w->groups)), scale = EVERY(1.0f), sums[4];
    V dot[4][4]; /* several sums of a row, for one has to wait for the product before */
    V table = FROM(CODES) - (zero - BASE);
    for (int r = 0; r < rows; r++) sums[r] = dot[r][0] = dot[r][1] = dot[r][2] = dot[r][3] = EVERY(0.0f);
    for (int64_t block = 0; block * BLOCK < w->in; block++) {
        const uint8_t *bytes = bytes_of(w, channel, block, room);
        const float *x = (const float *)chunk->codes.codes + row * stride + block * BLOCK;
        if (!interleaved && w->bits < 8) spread(bytes, w->bits, codes), bytes = codes;
        if (grouping == WHOLE_BLOCKS) {
            if (block * BLOCK == (group + 1) * w->group) group++;
            zero = EVERY(of.zero[group]), scale = EVERY(of.scale[group]), table = FROM(CODES) - (zero - BASE);
        }
#define ADD(value, at, chain)                                                                                          \
    _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++)                                                             \
        dot[r][(chain) % (rows == 1 ? 4 : 2)] += (value) * FROM(x + r * stride + (at));
#define FOLD                                                                                                           \
    _Pragma("GCC unroll 4") for (int r = 0; r < rows; r++) {                                                           \
        sums[r] += (dot[r][0] + dot[r][1] + (dot[r][2] + dot[r][3])) * scale;                                          \
        dot[r][0] = dot[r][1] = dot[r][2] = dot[r][3] = EVERY(0.0f);                                                   \
    }
#define GROUPS(i)                                                                                                      \
    int64_t from = (block * BLOCK + (i) * unit) >> shift;                                                              \
    zero = PICK(FROM(of.zero + from), lanes), scale = PICK(FROM(of.scale + from), lanes);
        if (interleaved && grouping == MIXED_BLOCKS)
#pragma GCC unroll 4
            for (int i = 0; i < 32; i += W) {
                GROUPS(i)
                NAME(ints) words = (NAME(ints))WORDS(bytes + 2 * i);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) ADD(ABOVE(words >> 4 * j & 15) - zero, 32 * j + i, j)
                FOLD
            }
        else if (interleaved)
#pragma GCC unroll 4
            for (int i = 0; i < 32; i += W) {
                NAME(ints) words = (NAME(ints))WORDS(bytes + 2 * i);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) ADD(NIBBLE(words, j, table, zero), 32 * j + i, j)
            }
        else
#pragma GCC unroll 16
            for (int i = 0; i < BLOCK; i += W) {
                if (grouping == MIXED_BLOCKS) {
                    GROUPS(i)
                }
                ADD(BYTE(bytes + i, zero), i, i / W)
                if (grouping == MIXED_BLOCKS) FOLD
            }
        if (grouping == WHOLE_BLOCKS) FOLD
#undef ADD
#undef FOLD
#undef GROUPS
    }
    for (int r = 0; r < rows; r++) {
        V sum = sums[r] + (dot[r][0] + dot[r][1] + (dot[r][2] + dot[r][3]));
        store(w, channel, SUM(sum), y, dtype, y_row + r);
    }
}

TARGET INLINE void NAME(channels)(int interleaved, grouping_t grouping, const weights_t *w, const chunk_t *chunk,
                                  int64_t rows, int64_t first, void *y, int dtype, int64_t y_row) {
    for (int64_t channel = first; channel < first + PANEL && channel < w->out; channel++) {
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4)
            NAME(channel)(interleaved, grouping, 4, w, chunk, row, channel, y, dtype, y_row + row);
        for (; row < rows; row++) NAME(channel)(interleaved, grouping, 1, w, chunk, row, channel, y, dtype, y_row + row);
    }
}

TARGET static void NAME(few)(const weights_t *w, const chunk_t *chunk, int64_t rows, int64_t first, void *y, int dtype,
                             int64_t y_row) {
    grouping_t grouping = grouping_of(w);
#define CHANNELS(INTERLEAVED, GROUPING)                                                                                \
    if ((w->bits == 4) == INTERLEAVED && grouping == GROUPING)                                                         \
        NAME(channels)(INTERLEAVED, GROUPING, w, chunk, rows, first, y, dtype, y_row);
    CHANNELS(0, ONE_GROUP)
    CHANNELS(0, WHOLE_BLOCKS)
    CHANNELS(0, MIXED_BLOCKS)
    CHANNELS(1, ONE_GROUP)
    CHANNELS(1, WHOLE_BLOCKS)
    CHANNELS(1, MIXED_BLOCKS)
#undef CHANNELS
}

/* t (w − v) of a block of a channel, by position; w − v if the channel has one t. Of no meaning beyond the row. */
TARGET INLINE void NAME(row)(const weights_t *w, of_groups_t of, int64_t channel, int64_t block, float *to) {
    uint8_t room[BLOCK + 8], codes[BLOCK];
    const uint8_t *bytes = bytes_of(w, channel, block, room);
    int unit = w->bits == 4 ? 4 : 1, mixed = grouping_of(w) == MIXED_BLOCKS, shift = __builtin_ctz((unsigned)w->group);
    int64_t group = w->groups > 1 ? block * BLOCK / w->group : 0;
    NAME(ints) lanes = NAME(groups)(w, unit);
    V zero = EVERY(of.zero[group]), scale = EVERY(w->groups > 1 ? of.scale[group] : 1);
    if (w->bits != 4 && w->bits < 8) spread(bytes, w->bits, codes), bytes = codes;
    for (int i = 0; i < BLOCK / unit; i += W) {
        if (mixed) {
            int64_t from = (block * BLOCK + i * unit) >> shift;
            zero = PICK(FROM(of.zero + from), lanes), scale = PICK(FROM(of.scale + from), lanes);
        }
        if (unit == 1)
            AT(to + i) = BYTE(bytes + i, zero) * scale;
        else
            for (int j = 0; j < 4; j++)
                AT(to + 32 * j + i) = (ABOVE((NAME(ints))WORDS(bytes + 2 * i) >> 4 * j & 15) - zero) * scale;
    }
}

#undef V
#undef AT
#undef FROM
#undef EVERY
#undef ABOVE
#undef NIBBLE
#undef PICK
#undef SUM
#undef BYTE
#undef TARGET
#undef NAME
#undef W
#undef WORDS
#undef BYTES
