// Attention of one head of one position over its keys, and how a step's keys and values lie in memory.
#pragma once
#include <math.h>
#include "vectors.h"

// Keys and values, float32 [layers, 2, rows, heads, places, d_kv]; strides in floats
typedef struct {
    float *memory;
    int64_t layer, kind, row, head;
} Cache;

INLINE float *entry(const Cache *cache, int64_t layer, int kind, int64_t row, int64_t head) {
    return cache->memory + layer * cache->layer + kind * cache->kind + row * cache->row + head * cache->head;
}

// Which row of the cache holds each token of a row: its own, or where beams have moved, that of an ancestor.
typedef struct {
    const uint8_t *ancestors;  // [tokens] of the row; NULL for its own
    int64_t row, first;        // its own row, and the first row of its batch entry
} Places;

INLINE int64_t offset_of(const Places *places, const Cache *cache, int64_t token, int64_t width) {
    int64_t row = places->ancestors ? places->first + places->ancestors[token] : places->row;
    return row * cache->row + token * width;
}

INLINE Floats lanes_of_dot(const float *a, const float *b, int64_t width) {
    Floats sums = all(0.0f);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) sums = fused(load(a + i), load(b + i), sums);
    if (i < width) sums = fused(load_some(a + i, width - i), load_some(b + i, width - i), sums);
    return sums;
}
INLINE float dot(const float *a, const float *b, int64_t width) { return sum_of(lanes_of_dot(a, b, width)); }

// Turn scores into weights that sum to 1; room for a multiple of LANES.
static void softmax(float *scores, int64_t count) {
    int64_t room = (count + LANES - 1) / LANES * LANES;
    for (int64_t i = count; i < room; i++) scores[i] = -INFINITY;
    Floats most = all(-INFINITY), sums = all(0.0f);
    for (int64_t i = 0; i < room; i += LANES) most = larger(most, load(scores + i));
    Floats largest = all(largest_of(most));
    for (int64_t i = 0; i < room; i += LANES) {
        Floats weights = exponential(load(scores + i) - largest);
        store(scores + i, weights);
        sums += weights;
    }
    Floats by = all(1.0f / sum_of(sums));
    for (int64_t i = 0; i < room; i += LANES) store(scores + i, load(scores + i) * by);
}

// `held` vectors of the sum of values by their weights, or where it is 0 the first `rest` numbers of one. Every other value is added to
// sums of its own: additions to one sum wait for one another.
INLINE void part_of_sum(const int held, int64_t rest, const float *weights, const float *values, const Places *places,
                        const Cache *cache, int64_t count, int64_t width, float *to) {
    Floats sums[2][4] = {};
    for (int64_t t = 0; t < count; t += 2)
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            if (odd && t + 1 == count) break;
            const float *value = values + offset_of(places, cache, t + odd, width);
            Floats weight = all(weights[t + odd]);
#pragma GCC unroll 4
            for (int v = 0; v < held; v++) sums[odd][v] = fused(weight, load(value + v * LANES), sums[odd][v]);
            if (!held) sums[odd][0] = fused(weight, load_some(value, rest), sums[odd][0]);
        }
#pragma GCC unroll 4
    for (int v = 0; v < held; v++) store(to + v * LANES, sums[0][v] + sums[1][v]);
    if (!held) {
        Floats sum = sums[0][0] + sums[1][0];
        memcpy(to, &sum, (size_t)rest * sizeof *to);
    }
}

// The sum of values by their weights, [width]. `values` is of row 0 of the cache.
static void weighted_sum(const float *weights, const float *values, const Places *places, const Cache *cache, int64_t count,
                         int64_t width, float *to) {
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) part_of_sum(4, 0, weights, values + i, places, cache, count, width, to + i);
    for (; i + 2 * LANES <= width; i += 2 * LANES) part_of_sum(2, 0, weights, values + i, places, cache, count, width, to + i);
    for (; i + LANES <= width; i += LANES) part_of_sum(1, 0, weights, values + i, places, cache, count, width, to + i);
    if (i < width) part_of_sum(0, width - i, weights, values + i, places, cache, count, width, to + i);
}

// Scores of a query over the keys, without bias.
static void scores_of(const float *query, const float *keys, const Places *places, const Cache *cache, int64_t count,
                      int64_t width, float *scores) {
    int64_t t = 0;
    for (; t + SUMS_AT_ONCE <= count; t += SUMS_AT_ONCE) {
        Floats lanes[SUMS_AT_ONCE] = {};
        const float *key[SUMS_AT_ONCE];
        int64_t i = 0;
#pragma GCC unroll 8
        for (int k = 0; k < SUMS_AT_ONCE; k++) key[k] = keys + offset_of(places, cache, t + k, width);
        for (; i + LANES <= width; i += LANES) {  // the sums of `lanes_of_dot`
            Floats part = load(query + i);
#pragma GCC unroll 8
            for (int k = 0; k < SUMS_AT_ONCE; k++) lanes[k] = fused(part, load(key[k] + i), lanes[k]);
        }
        if (i < width) {
            Floats part = load_some(query + i, width - i);
#pragma GCC unroll 8
            for (int k = 0; k < SUMS_AT_ONCE; k++) lanes[k] = fused(part, load_some(key[k] + i, width - i), lanes[k]);
        }
        several_sums(lanes, scores + t);
    }
    for (; t < count; t++) scores[t] = dot(query, keys + offset_of(places, cache, t, width), width);
}
