// The largest logit of a row by fewer bytes: all logits by an output matrix in 8 bits first, and then those in float32 that could be
// the largest.
//
// With w = r + e, r being the rounded weights of an output, and a row h = s + d, s being its rounded numbers, a logit w h differs from
// the rough one r s by at most |h| |e| + |d| |r| (Cauchy and Schwarz). So no logit is the largest that is further below another one than
// the bounds of both.
#pragma once
#include "attention.h"
#include "products.h"

typedef struct {
    Group group;              // of one part, in 8 bits
    const float *errors;      // [outputs], lengths |e|
    const float *lengths;     // [outputs], |r|
} RoughHead;

// above 1 by more than the rounding of float32 in all sums here
static const float MARGIN = 1.001f;

// Round a float32 output matrix [outputs, inputs] by the largest magnitude of each output, into the tiles of `t5_pack`. Python calls it.
void t5_round_head(const float *from, int64_t inputs, int64_t outputs, uint8_t *to, float *scales, float *errors, float *lengths) {
    int64_t wide = padded(inputs);
    memset(to, 128, (size_t)((outputs + TILE - 1) / TILE * TILE * wide));
    for (int64_t o = 0; o < outputs; o++) {
        const float *row = from + o * inputs;
        float largest = 0.0f, error = 0.0f, length = 0.0f;
        for (int64_t i = 0; i < inputs; i++) largest = fabsf(row[i]) > largest ? fabsf(row[i]) : largest;
        float scale = largest / 127.0f, by = largest > 0.0f ? 127.0f / largest : 0.0f;
        uint8_t *tile = to + o / TILE * TILE * wide + 4 * (o % TILE);
        for (int64_t i = 0; i < inputs; i++) {
            float rounded = (row[i] * by + 12582912.0f) - 12582912.0f, rough = rounded * scale;
            tile[i / 4 * 4 * TILE + i % 4] = (uint8_t)((int32_t)rounded + 128);
            error += (row[i] - rough) * (row[i] - rough);
            length += rough * rough;
        }
        scales[o] = scale, errors[o] = sqrtf(error), lengths[o] = sqrtf(length);
    }
}

// How far a row's rough logits may be off, in parts: |h| and |d|.
static void row_lengths(const float *row, const int8_t *bytes, float scale, int64_t width, float *length, float *error) {
    float squares = 0.0f, errors = 0.0f;
    for (int64_t i = 0; i < width; i++) {
        float difference = row[i] - (float)bytes[i] * scale;
        squares += row[i] * row[i];
        errors += difference * difference;
    }
    *length = sqrtf(squares) * MARGIN;
    *error = sqrtf(errors) * MARGIN;
}

INLINE float bound_of(const RoughHead *rough, int64_t output, float length, float error) {
    return length * rough->errors[output] + error * rough->lengths[output];
}

// The largest lower bound among outputs `first` to `end` of a row.
static float least_best(const RoughHead *rough, const float *logits, int64_t first, int64_t end, float length, float error) {
    float best = -INFINITY;
    for (int64_t o = first; o < end; o++) {
        float least = logits[o] - bound_of(rough, o, length, error);
        best = least > best ? least : best;
    }
    return best;
}

// Compute those again that could be the largest logit, given the largest lower bound.
static void refine(const RoughHead *rough, const Part *head, const float *row, int64_t inputs, float best, int64_t first,
                   int64_t end, float length, float error, float *logits) {
    for (int64_t o = first; o < end; o++)
        if (logits[o] + bound_of(rough, o, length, error) >= best) {
            float found[ROWS_AT_ONCE][OUTPUTS_AT_ONCE], sum = 0.0f;
            for (int64_t from = 0; from < inputs; from += INPUTS_AT_ONCE) {  // in the pieces of `float_block`
                int64_t to = from + INPUTS_AT_ONCE < inputs ? from + INPUTS_AT_ONCE : inputs;
                dot_block(1, 1, FLOAT32, head->weights, o, row, inputs, inputs, from, to, found);
                sum = from ? sum + found[0][0] : found[0][0];
            }
            logits[o] = sum;
        }
}
