// Products of a few rows with a matrix in float32, bfloat16 or 8 bits. A row's result does not depend on the other rows.
#pragma once
#include "vectors.h"

enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
enum { OUTPUTS_AT_ONCE = SUMS_AT_ONCE, ROWS_AT_ONCE = 3, INPUTS_AT_ONCE = 1024 };  // as many sums as there are registers
enum { TILE = 16, BYTE_ROWS_AT_ONCE = 8 };  // outputs of a tile of 8-bit weights; rows of 8 bits

typedef float OutputsAt __attribute__((vector_size(4 * SUMS_AT_ONCE), aligned(4), may_alias));

// One matrix of a group: float32 or bfloat16 as in the checkpoint, [outputs, inputs]; 8 bits as `t5_pack` lays them out.
typedef struct {
    const void *weights;
    const float *scales;  // of outputs, for 8 bits
    int64_t outputs;
} Part;

// Matrices that multiply the same rows; their outputs follow one another.
typedef struct {
    Part parts[3];
    int32_t count, type;
    int64_t inputs, outputs;
} Group;

// Rows as a group of matrices reads them: float32 [rows, inputs], or int8 [rows, padded inputs] with the scale of each row and
// 128 times the sum of its numbers.
typedef struct {
    float *floats;
    int8_t *bytes;
    float *scales;
    int32_t *sums;
    int64_t width;
} Rows;

// Compilers else load a vector from memory once for each row that it is multiplied by, which takes twice as long where it spans two
// lines of the cache: tensors of a file begin anywhere.
#if defined(__AVX__)
#define KEEP_IN_REGISTER(vector) __asm__("" : "+v"(vector))
#else
#define KEEP_IN_REGISTER(vector) ((void)0)
#endif

INLINE int64_t padded(int64_t inputs) { return (inputs + 3) & ~(int64_t)3; }

// --- float32 and bfloat16: some outputs of some rows at once ------------------------------------------------------------------

INLINE Floats load_weights(int type, const void *weights, int64_t at) {
    return type == FLOAT32 ? load((const float *)weights + at) : load_bf16((const uint16_t *)weights + at);
}
INLINE Floats load_some_weights(int type, const void *weights, int64_t at, int64_t count) {
    return type == FLOAT32 ? load_some((const float *)weights + at, count) : load_some_bf16((const uint16_t *)weights + at, count);
}
INLINE float one_weight(int type, const void *weights, int64_t at) {
    return type == FLOAT32 ? ((const float *)weights)[at] : one_bf16(((const uint16_t *)weights)[at]);
}

// results[m][o] of outputs first .. first + OUTPUTS - 1 and ROWS rows over inputs `from` to `to`; the weights behind them are
// prefetched.
INLINE void dot_block(const int OUTPUTS, const int ROWS, const int type, const void *weights, int64_t first, const float *rows,
                      int64_t width, int64_t inputs, int64_t from, int64_t to, float results[ROWS_AT_ONCE][OUTPUTS_AT_ONCE]) {
    Floats sums[ROWS_AT_ONCE][OUTPUTS_AT_ONCE];  // in registers: all loops over them are unrolled
#pragma GCC unroll 3
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) sums[m][o] = all(0.0f);
    int64_t i = from;
    for (; i + LANES <= to; i += LANES) {
        Floats row[ROWS_AT_ONCE];
#pragma GCC unroll 3
        for (int m = 0; m < ROWS; m++) row[m] = load(rows + m * width + i);
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) {
            int64_t at = (first + o) * inputs + i;
            Floats weight = load_weights(type, weights, at);
            if (ROWS > 1) KEEP_IN_REGISTER(weight);
            if (ROWS == 1) __builtin_prefetch((const char *)weights + (at + OUTPUTS * inputs) * (type == FLOAT32 ? 4 : 2), 0, 3);
#pragma GCC unroll 3
            for (int m = 0; m < ROWS; m++) sums[m][o] = fused(weight, row[m], sums[m][o]);
        }
    }
    if (i < to) {
        Floats row[ROWS_AT_ONCE];
#pragma GCC unroll 3
        for (int m = 0; m < ROWS; m++) row[m] = load_some(rows + m * width + i, to - i);
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) {
            Floats weight = load_some_weights(type, weights, (first + o) * inputs + i, to - i);
#pragma GCC unroll 3
            for (int m = 0; m < ROWS; m++) sums[m][o] = fused(weight, row[m], sums[m][o]);
        }
    }
#pragma GCC unroll 3
    for (int m = 0; m < ROWS; m++) {
        if (OUTPUTS == 1) results[m][0] = sum_of(sums[m][0]);
        else several_sums(sums[m], results[m]);
    }
}

// --- 8 bits: a tile of 16 outputs, four inputs after the other ----------------------------------------------------------------

typedef int32_t Sums __attribute__((vector_size(64)));

// sums[m] += the products of four inputs of 16 outputs (bytes 0 to 255, which are weights plus 128) and four numbers of a row
INLINE Sums add_four(Sums sums, const uint8_t *weights, const int8_t *row) {
    int32_t four;
    memcpy(&four, row, 4);
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    __m512i tile = _mm512_loadu_si512(weights);
    return (Sums)_mm512_dpbusd_epi32((__m512i)sums, tile, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    // in 16 bits, so that no sum saturates: even and odd bytes apart
    __m256i numbers = _mm256_set1_epi32(four), odd = _mm256_srai_epi16(numbers, 8);
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(numbers, 8), 8), low = _mm256_set1_epi16(0xff);
    union {
        Sums all;
        __m256i half[2];
    } made = {sums};
    for (int h = 0; h < 2; h++) {
        __m256i tile = _mm256_loadu_si256((const __m256i *)weights + h);
        __m256i first = _mm256_madd_epi16(_mm256_and_si256(tile, low), even);
        __m256i second = _mm256_madd_epi16(_mm256_srli_epi16(tile, 8), odd);
        made.half[h] = _mm256_add_epi32(made.half[h], _mm256_add_epi32(first, second));
    }
    return made.all;
#else
    for (int o = 0; o < TILE; o++)
        for (int i = 0; i < 4; i++) sums[o] += (int32_t)weights[4 * o + i] * row[i];
    return sums;
#endif
}

// sums[m] of TILES tiles, one after the other, for ROWS rows. Few rows take several sums, so that additions need not wait for one
// another.
INLINE void tile_block(const int TILES, const int ROWS, const uint8_t *tile, const int8_t *rows, int64_t width, int64_t inputs,
                       Sums found[2][BYTE_ROWS_AT_ONCE]) {
    const int CHAINS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
    Sums sums[2][4][BYTE_ROWS_AT_ONCE];
    for (int t = 0; t < TILES; t++)
        for (int c = 0; c < CHAINS; c++)
            for (int m = 0; m < ROWS; m++) sums[t][c][m] = (Sums){};
    int64_t i = 0;
    for (; i + 4 * CHAINS <= inputs; i += 4 * CHAINS) {
        if (ROWS > 1)
            for (int t = 0; t < TILES; t++)
                for (int c = 0; c < CHAINS; c++)
                    __builtin_prefetch(tile + ((TILES + t) * inputs + i + 4 * c) * TILE, 0, 3);
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++)
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 2
                for (int t = 0; t < TILES; t++)
                    sums[t][c][m] = add_four(sums[t][c][m], tile + (t * inputs + i + 4 * c) * TILE, rows + m * width + i + 4 * c);
    }
    for (; i < inputs; i += 4)
        for (int m = 0; m < ROWS; m++)
            for (int t = 0; t < TILES; t++)
                sums[t][0][m] = add_four(sums[t][0][m], tile + (t * inputs + i) * TILE, rows + m * width + i);
    for (int t = 0; t < TILES; t++)
        for (int m = 0; m < ROWS; m++) {
            found[t][m] = sums[t][0][m];
            for (int c = 1; c < CHAINS; c++) found[t][m] += sums[t][c][m];
        }
}

// Lay out rounded weights [inputs, columns] for `tile_block`: [columns / 16, inputs / 4, 16, 4], plus 128. Bytes that are
// `shifted` have 128 added already. Python calls it.
void t5_pack(const uint8_t *from, int64_t inputs, int64_t columns, int shifted, uint8_t *to) {
    int64_t wide = padded(inputs), tiles = (columns + TILE - 1) / TILE;
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t i = 0; i < wide; i += 4)
            for (int o = 0; o < TILE; o++)
                for (int k = 0; k < 4; k++) {
                    int64_t column = tile * TILE + o;
                    int inside = i + k < inputs && column < columns;
                    uint8_t byte = inside ? from[(i + k) * columns + column] : (shifted ? 128 : 0);
                    to[(tile * wide + i) * TILE + 4 * o + k] = shifted ? byte : byte ^ 128;
                }
}

// --- a group --------------------------------------------------------------------------------------------------------------------

typedef struct {
    float *to;
    int64_t stride;  // floats from row to row
    int adds;        // to what is there
} Results;

typedef float Tile __attribute__((vector_size(64)));
typedef float TileAt __attribute__((vector_size(64), aligned(4), may_alias));

// A tile of sums as float32 results of a row.
INLINE void put_tile(const Results *results, const Rows *rows, const float *scales, int64_t row, int64_t output, int outputs,
                     Sums sums) {
    float *to = results->to + row * results->stride + output;
    Tile found = __builtin_convertvector(sums - rows->sums[row], Tile);
    if (outputs == TILE) {
        found *= *(const TileAt *)scales * rows->scales[row];
        if (results->adds) found += *(const TileAt *)to;
        *(TileAt *)to = found;
        return;
    }
    for (int o = 0; o < outputs; o++) {
        float value = found[o] * (scales[o] * rows->scales[row]);
        to[o] = results->adds ? to[o] + value : value;
    }
}

// Outputs first .. first + OUTPUTS - 1 of all rows. Long rows are read in pieces, so that the weights of a piece stay in the
// nearest cache while all rows use them.
INLINE void float_block(const int OUTPUTS, const int type, const Group *group, const Part *part, int64_t before, int64_t first,
                        const Rows *rows, int64_t count, const Results *results) {
    float found[ROWS_AT_ONCE][OUTPUTS_AT_ONCE];
    int64_t inputs = group->inputs;
    for (int64_t from = 0; from < inputs; from += INPUTS_AT_ONCE) {
        int64_t to = from + INPUTS_AT_ONCE < inputs ? from + INPUTS_AT_ONCE : inputs;
        for (int64_t m = 0; m < count;) {
            const float *row = rows->floats + m * rows->width;
            int at_once = count - m >= 3 ? 3 : (int)(count - m);
            if (at_once == 3) dot_block(OUTPUTS, 3, type, part->weights, first, row, rows->width, inputs, from, to, found);
            else if (at_once == 2) dot_block(OUTPUTS, 2, type, part->weights, first, row, rows->width, inputs, from, to, found);
            else dot_block(OUTPUTS, 1, type, part->weights, first, row, rows->width, inputs, from, to, found);
            for (int r = 0; r < at_once; r++, m++) {
                float *at = results->to + m * results->stride + before + first;
                if (OUTPUTS == OUTPUTS_AT_ONCE) {
                    OutputsAt made = *(const OutputsAt *)found[r];
                    if (results->adds || from) made += *(const OutputsAt *)at;
                    *(OutputsAt *)at = made;
                } else
                    for (int o = 0; o < OUTPUTS; o++) at[o] = results->adds || from ? at[o] + found[r][o] : found[r][o];
            }
        }
    }
}

static void float_outputs(const Group *group, const Part *part, int64_t before, int64_t first, int64_t end, const Rows *rows,
                          int64_t count, const Results *results) {
    int64_t o = first;
    if (group->type == FLOAT32) {
        for (; o + OUTPUTS_AT_ONCE <= end; o += OUTPUTS_AT_ONCE)
            float_block(OUTPUTS_AT_ONCE, FLOAT32, group, part, before, o, rows, count, results);
        for (; o < end; o++) float_block(1, FLOAT32, group, part, before, o, rows, count, results);
    } else {
        for (; o + OUTPUTS_AT_ONCE <= end; o += OUTPUTS_AT_ONCE)
            float_block(OUTPUTS_AT_ONCE, BFLOAT16, group, part, before, o, rows, count, results);
        for (; o < end; o++) float_block(1, BFLOAT16, group, part, before, o, rows, count, results);
    }
}

static void byte_outputs(const Group *group, const Part *part, int64_t before, int64_t first, int64_t end, const Rows *rows,
                         int64_t count, const Results *results) {
    int64_t wide = padded(group->inputs);
    Sums found[2][BYTE_ROWS_AT_ONCE];
    for (int64_t o = first; o < end;) {
        const uint8_t *tile = (const uint8_t *)part->weights + o * wide;
        int tiles = count >= BYTE_ROWS_AT_ONCE && o + TILE < end ? 2 : 1;
        for (int64_t m = 0; m < count;) {
            const int8_t *from = rows->bytes + m * rows->width;
            int at_once = count - m >= 8 ? 8 : count - m >= 4 ? 4 : count - m >= 2 ? 2 : 1;
#define BLOCK(ROWS)                                                                                                             \
    if (tiles == 2) tile_block(2, ROWS, tile, from, rows->width, wide, found);                                                  \
    else tile_block(1, ROWS, tile, from, rows->width, wide, found)
            if (at_once == 8) { BLOCK(8); }
            else if (at_once == 4) { BLOCK(4); }
            else if (at_once == 2) { BLOCK(2); }
            else { BLOCK(1); }
#undef BLOCK
            for (int t = 0; t < tiles; t++) {
                int64_t output = o + t * TILE;
                int outputs = part->outputs - output < TILE ? (int)(part->outputs - output) : TILE;
                for (int r = 0; r < at_once; r++)
                    put_tile(results, rows, part->scales + output, m + r, before + output, outputs, found[t][r]);
            }
            m += at_once;
        }
        o += tiles * TILE;
    }
}

// One thread's share of a group's outputs, in tiles of 16.
static void product(const Group *group, const Rows *rows, int64_t count, Results results, int index, int threads) {
    int64_t tiles = 0, before = 0;
    for (int p = 0; p < group->count; p++) tiles += (group->parts[p].outputs + TILE - 1) / TILE;
    int64_t first = tiles * index / threads, end = tiles * (index + 1) / threads;
    for (int p = 0; p < group->count; p++) {
        const Part *part = &group->parts[p];
        int64_t of_part = (part->outputs + TILE - 1) / TILE;
        int64_t from = first > 0 ? first : 0, to = end < of_part ? end : of_part;
        if (from < to) {
            int64_t last = to * TILE < part->outputs ? to * TILE : part->outputs;
            if (group->type == INT8) byte_outputs(group, part, before, from * TILE, last, rows, count, &results);
            else float_outputs(group, part, before, from * TILE, last, rows, count, &results);
        }
        first -= of_part;
        end -= of_part;
        before += part->outputs;
    }
}
