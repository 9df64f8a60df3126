// What a search does with logits: log-softmax, and the best continuations of beams. One thread, as each is a pass or two over them.
#pragma once
#include <math.h>

#include "vectors.h"

enum { BLOCK = 8 * LANES };  // scores that are compared by their largest one

// Where a row's log-softmax comes from: (x - maximum) - log_sum. A row with NaN, or without a finite maximum, has NaN for both.
typedef struct {
    float maximum, log_sum;
} Shift;

static const Shift UNSHIFTED = {0.0f, 0.0f};

INLINE int any(Ints where) { return largest_of(chosen(where, all(1.0f), all(0.0f))) > 0.0f; }

// The largest of a row; NaN if there is NaN in it.
static float row_maximum(const float *row, int64_t width) {
    Floats most[2] = {all(-INFINITY), all(-INFINITY)};
    Ints unordered = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES)
        for (int part = 0; part < 2; part++) {
            Floats x = load(row + i + part * LANES);
            most[part] = larger(x, most[part]);
            unordered |= (Ints)(x != x);
        }
    float maximum = largest_of(larger(most[0], most[1]));
    int ordered = !any(unordered);
    for (; i < width; i++) {
        maximum = row[i] > maximum ? row[i] : maximum;
        ordered &= row[i] == row[i];
    }
    return ordered ? maximum : NAN;
}

static Shift shift_of(const float *row, int64_t width) {
    float maximum = row_maximum(row, width);
    if (!isfinite(maximum)) return (Shift){NAN, NAN};
    double sum = 0.0;
    int64_t i = 0;
    while (i + LANES <= width) {  // float32 for a part of the row: the error of a sum grows with its length
        Floats part = {};
        int64_t end = i + 64 * LANES < width ? i + 64 * LANES : width;
        for (; i + LANES <= end; i += LANES) part += exponential(load(row + i) - maximum);
        sum += (double)sum_of(part);
    }
    for (; i < width; i++) sum += (double)expf(row[i] - maximum);
    return (Shift){maximum, (float)log(sum)};
}

// The best sums so far, in falling order, the first of equal ones first.
typedef struct {
    float *values;
    int64_t *places;
    int64_t room, count;
} Best;

static void keep(Best *best, float value, int64_t place) {
    int full = best->count == best->room;
    if (full && !(value > best->values[best->room - 1])) return;
    int64_t at = full ? best->room - 1 : best->count++;
    for (; at > 0 && value > best->values[at - 1]; at--) {
        best->values[at] = best->values[at - 1];
        best->places[at] = best->places[at - 1];
    }
    best->values[at] = value, best->places[at] = place;
}

INLINE float shifted(float x, Shift by, float added) { return ((x - by.maximum) - by.log_sum) + added; }

static void keep_best(const float *row, int64_t from, int64_t to, Shift by, float added, const uint8_t *hidden, int64_t first, Best *best) {
    for (int64_t i = from; i < to; i++) keep(best, hidden && hidden[i] ? -INFINITY : shifted(row[i], by, added), first + i);
}

// Add a row's sums to the best; `hidden` are left out. `shifted` keeps the order, so a block is looked through only for its largest.
// Returns 0 if there is NaN in the row.
static int search_row(const float *row, int64_t width, Shift by, float added, const uint8_t *hidden, int64_t first, Best *best) {
    Ints unordered = {};
    int64_t i = 0;
    for (; i + BLOCK <= width; i += BLOCK) {
        Floats most[2] = {all(-INFINITY), all(-INFINITY)};
        for (int part = 0; part < 8; part++) {
            Floats x = load(row + i + part * LANES);
            most[part & 1] = larger(x, most[part & 1]);
            unordered |= (Ints)(x != x);
        }
        float largest = shifted(largest_of(larger(most[0], most[1])), by, added);
        if (best->count < best->room || largest > best->values[best->room - 1])
            keep_best(row, i, i + BLOCK, by, added, hidden, first, best);
    }
    keep_best(row, i, width, by, added, hidden, first, best);
    int ordered = !any(unordered);
    for (; i < width; i++) ordered &= row[i] == row[i];
    return ordered;
}

// --- what Python calls ----------------------------------------------------------------------------------------------------------

// The logarithms of the softmax of rows, into `out`, which may be `logits`.
void t5_log_softmax(const float *logits, int64_t rows, int64_t vocabulary, float *out) {
    for (int64_t row = 0; row < rows; row++, logits += vocabulary, out += vocabulary) {
        Shift by = shift_of(logits, vocabulary);
        int64_t i = 0;
        for (; i + LANES <= vocabulary; i += LANES) store(out + i, (load(logits + i) - by.maximum) - by.log_sum);
        for (; i < vocabulary; i++) out[i] = shifted(logits[i], by, 0.0f);
    }
}

// The `count` largest sums of a beam's score `added` and its scores, or their log-softmax if `normalizes`, over all tokens of all beams
// of each batch entry. `hidden` tokens count as -inf; NULL hides none. With NaN among the scores of an entry all its values are NaN.
void t5_best_sums(const float *scores, const float *added, const uint8_t *hidden, int normalizes, int64_t batch, int64_t beams,
                  int64_t vocabulary, int64_t count, float *values, int64_t *places) {
    for (int64_t entry = 0; entry < batch; entry++, values += count, places += count) {
        Best best = {values, places, count, 0};
        int ordered = 1;
        for (int64_t beam = 0; beam < beams; beam++, scores += vocabulary, added++) {
            Shift by = normalizes ? shift_of(scores, vocabulary) : UNSHIFTED;
            ordered &= search_row(scores, vocabulary, by, *added, hidden, beam * vocabulary, &best) && by.maximum == by.maximum;
        }
        for (int64_t i = 0; i < count && !ordered; i++) values[i] = NAN;
    }
}
