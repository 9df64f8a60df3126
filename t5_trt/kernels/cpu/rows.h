// Rows as products read them: normed, activated or as they are, and for 8-bit weights rounded.
#pragma once
#include "decoder.h"

// A row of the embedding.
static void look_up(const Model *model, int64_t token, float *to) {
    for (int64_t i = 0, from = token * model->d_model; i < model->d_model; i++)
        to[i] = one_weight(model->embedding_type, model->embedding, from + i);
}

static float length_factor(const float *row, int64_t width, float epsilon) {
    float squares = dot(row, row, width);
    return 1.0f / sqrtf(squares / (float)width + epsilon);
}

static void normalize(const float *row, const float *weight, float factor, int64_t width, float *to) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, load(row + i) * factor * load(weight + i));
    for (; i < width; i++) to[i] = row[i] * factor * weight[i];
}

INLINE Floats activated(int kind, Floats x) {
    if (kind == RELU) return larger(x, all(0.0f));
    if (kind == SILU) return x / (1.0f + exponential(-x));
    // x sigmoid(2 u) is x (1 + tanh(u)) / 2
    return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

static void activate(const Model *model, const float *inner, float *to) {
    const float *gate = model->gated ? inner + model->d_ff : NULL;
    int kind = model->activation;
    int64_t i = 0;
    if (kind != GELU)
        for (; i + LANES <= model->d_ff; i += LANES) {
            Floats x = kind == RELU ? activated(RELU, load(inner + i))
                     : kind == SILU ? activated(SILU, load(inner + i))
                                    : activated(GELU_NEW, load(inner + i));
            store(to + i, gate ? x * load(gate + i) : x);
        }
    for (; i < model->d_ff; i++) {
        float x = inner[i], y;
        if (kind == RELU) y = x > 0.0f ? x : 0.0f;
        else if (kind == SILU) y = x / (1.0f + expf(-x));
        else if (kind == GELU) y = 0.5f * x * (1.0f + erff(x * 0.70710678f));
        else y = 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
        to[i] = gate ? y * gate[i] : y;
    }
}

// Round a row to 8 bits by its largest magnitude.
static void round_row(const Rows *rows, int64_t row, const float *from, int64_t inputs) {
    Floats most = all(0.0f);
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES) {
        Floats x = load(from + i);
        most = larger(most, larger(x, -x));
    }
    float largest = largest_of(most);
    for (; i < inputs; i++) largest = fabsf(from[i]) > largest ? fabsf(from[i]) : largest;
    float by = largest > 0.0f ? 127.0f / largest : 0.0f;
    int8_t *to = rows->bytes + row * rows->width;
    int32_t sum = 0;
    for (i = 0; i < inputs; i++) {
        int32_t rounded = (int32_t)((from[i] * by + 12582912.0f) - 12582912.0f);
        to[i] = (int8_t)rounded;
        sum += rounded;
    }
    for (; i < rows->width; i++) to[i] = 0;
    rows->scales[row] = largest / 127.0f;
    rows->sums[row] = 128 * sum;
}

typedef enum { NORMED, ACTIVATED, AS_THEY_ARE } Source;

typedef struct {
    Source source;
    const float *from;  // [positions, stride]
    int64_t stride;
    const float *norm;
    float scale;
} Reading;

static void prepare_row(const Decoder *decoder, const Group *group, const Reading *reading, int64_t position, int64_t row,
                        const Rows *rows) {
    const Model *model = &decoder->model;
    const float *from = reading->from + position * reading->stride;
    float *to = rows->floats + (group->type == INT8 ? 0 : row * rows->width);  // rounded at once: room for one will do
    if (reading->source == NORMED)
        normalize(from, reading->norm, length_factor(from, group->inputs, model->epsilon) * reading->scale, group->inputs, to);
    else if (reading->source == ACTIVATED) activate(model, from, to);
    else if (group->type == INT8) to = (float *)from;
    else memcpy(to, from, (size_t)group->inputs * sizeof *to);
    if (group->type == INT8) round_row(rows, row, to, group->inputs);
}

// Rows of some width for the positions of a share; those of other shares are not in their way, whatever width these have.
static Rows rows_of_share(const Decoder *decoder, const Rows *rows, int64_t width, const Share *share) {
    int64_t first = share->first, skipped = first * decoder->widest;
    return (Rows){rows->floats + skipped, rows->bytes + skipped, rows->scales + first, rows->sums + first, width};
}

// The rows that a group reads, from the share's first position on: few are made by every thread, many by all threads together.
static Rows prepare(Decoder *decoder, const Group *group, const Reading *reading, const Share *share) {
    int64_t count = share->end - share->first;
    Rows rows = decoder->own[share->index];
    rows.width = group->type == INT8 ? padded(group->inputs) : group->inputs;
    if (share->columns == 1 ? count <= decoder->own_room : count * group->inputs <= PRIVATE) {
        for (int64_t row = 0; row < count; row++) prepare_row(decoder, group, reading, share->first + row, row, &rows);
        return rows;
    }
    Rows shared = rows_of_share(decoder, &decoder->shared, rows.width, share), mine = shared;
    if (group->type == INT8) mine.floats = rows.floats;  // where this thread makes a row before it is rounded
    for (int64_t row = share->column; row < count; row += share->columns)
        prepare_row(decoder, group, reading, share->first + row, row, &mine);
    meet(decoder, share);
    return shared;
}

// A thread's share of a group's results.
static void multiply_rows(const Group *group, const Rows *rows, Results results, const Share *share) {
    results.to += share->first * results.stride;
    product(group, rows, share->end - share->first, results, share->column, share->columns);
}

static void multiply(Decoder *decoder, const Group *group, const Reading *reading, Results results, const Share *share) {
    Rows rows = prepare(decoder, group, reading, share);
    multiply_rows(group, &rows, results, share);
    meet(decoder, share);
}
