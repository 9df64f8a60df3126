// The encoder: sources to their states, and to K and V of the decoder's cross-attention. What a source gets depends neither on other
// sources of its batch nor on hidden tokens behind it.
#pragma once
#include "memory.h"
#include "rows.h"

enum { QUERIES_AT_ONCE = 3, QUERIES_OF_TASK = 24, VALUES_AT_ONCE = 4 };

// Whether there are layers to run, or K and V are wanted of given states.
static int has_source(const Sources *sources) { return sources->tokens || sources->embeddings; }

static int64_t rounded_up(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

static int make_room_for_sources(Decoder *encoder, const Sources *sources) {
    const Model *model = &encoder->model;
    int64_t wide = inside_of_layer(model), length = sources->length, distances = 2 * length - 1;
    for (int64_t g = 0; g < model->cross_groups; g++) wide = wide > model->cross_kv[g].outputs ? wide : model->cross_kv[g].outputs;
    if (!make_room_for_lines(encoder, distances, 2)) return 0;
    for (int64_t l = 0; l <= model->layers; l++) atomic_store(&encoder->tasks[l], 0);
    return make_room_for_rows(encoder, sources->batch * length, wide, 2) &&
           make_room_for_scores(encoder, QUERIES_AT_ONCE * rounded_up(length));
}

static float *lines_of(const Decoder *encoder, int64_t layer, int64_t head) {
    return encoder->lines + (layer % 2 * encoder->model.heads + head) * encoder->lines_room;
}
static float *made_of(const Decoder *encoder, int64_t layer) {
    return encoder->made + layer % 2 * encoder->count * 3 * encoder->model.heads * encoder->model.d_kv;
}

// The bias of each distance -(length - 1) to length - 1, for a share of the heads: that of the first chunk for all.
static void lay_out_bias(Decoder *encoder, int64_t layer, const Share *share) {
    const Model *model = &encoder->model;
    const float *table = model->of[layer].bias;
    int64_t longest = model->longest_distance, last = encoder->sources->length - 1;
    if (share->first > 0) return;
    for (int64_t head = share->column; head < model->heads; head += share->columns)
        for (int64_t distance = -last; distance <= last; distance++) {
            int64_t place = distance < -longest ? -longest : distance > longest ? longest : distance;
            lines_of(encoder, layer, head)[last + distance] = table[model->buckets[longest + place] * model->heads + head];
        }
}

// Scores of QUERIES queries over the keys, each of `room` floats. Queries, keys and values are `stride` floats apart.
INLINE void scores_of_queries(const int QUERIES, const float *queries, const float *keys, int64_t count, int64_t stride,
                              int64_t width, float *scores, int64_t room) {
    float found[ROWS_AT_ONCE][OUTPUTS_AT_ONCE];
    int64_t t = 0;
    for (; t + OUTPUTS_AT_ONCE <= count; t += OUTPUTS_AT_ONCE) {
        dot_block(OUTPUTS_AT_ONCE, QUERIES, FLOAT32, keys, t, queries, stride, stride, 0, width, found);
        for (int q = 0; q < QUERIES; q++) memcpy(scores + q * room + t, found[q], sizeof found[q]);
    }
    for (; t < count; t++) {
        dot_block(1, QUERIES, FLOAT32, keys, t, queries, stride, stride, 0, width, found);
        for (int q = 0; q < QUERIES; q++) scores[q * room + t] = found[q][0];
    }
}

// VECTORS vectors of the sums of values by their weights, or where it is 0 the first `rest` numbers of one.
INLINE void sums_of_values(const int QUERIES, const int VECTORS, int64_t rest, const float *weights, int64_t room,
                           const float *values, int64_t count, int64_t stride, float *to, int64_t to_stride) {
    Floats sums[QUERIES_AT_ONCE][VALUES_AT_ONCE];
    for (int q = 0; q < QUERIES; q++)
        for (int v = 0; v < VALUES_AT_ONCE; v++) sums[q][v] = all(0.0f);
    for (int64_t t = 0; t < count; t++, values += stride) {
        if (!VECTORS)
            for (int q = 0; q < QUERIES; q++) sums[q][0] = fused(all(weights[q * room + t]), load_some(values, rest), sums[q][0]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            Floats value = load(values + v * LANES);
#pragma GCC unroll 3
            for (int q = 0; q < QUERIES; q++) sums[q][v] = fused(all(weights[q * room + t]), value, sums[q][v]);
        }
    }
    for (int q = 0; q < QUERIES; q++) {
        for (int v = 0; v < VECTORS; v++) store(to + q * to_stride + v * LANES, sums[q][v]);
        if (!VECTORS) memcpy(to + q * to_stride, &sums[q][0], (size_t)rest * sizeof *to);
    }
}

// Attention of QUERIES queries of one head, `first` the first of them, over the keys of their source.
INLINE void attend(const int QUERIES, const Decoder *encoder, int64_t layer, int64_t source, int64_t head, int64_t first,
                   int64_t keys, float *scores) {
    const Model *model = &encoder->model;
    int64_t width = model->d_kv, inner = model->heads * width, stride = 3 * inner, length = encoder->sources->length;
    int64_t room = rounded_up(length), i = 0;
    const float *of_source = made_of(encoder, layer) + source * length * stride + head * width, *values = of_source + 2 * inner;
    const float *hides = encoder->sources->key_bias + source * length;
    float *to = encoder->mixed + (source * length + first) * inner + head * width;
    scores_of_queries(QUERIES, of_source + first * stride, of_source + inner, keys, stride, width, scores, room);
    for (int q = 0; q < QUERIES; q++) {
        const float *bias = lines_of(encoder, layer, head) + length - 1 - (first + q);
        float *of_query = scores + q * room;
        for (int64_t t = 0; t < keys; t++) of_query[t] = of_query[t] + bias[t] + hides[t];
        softmax(of_query, keys);
    }
    for (; i + VALUES_AT_ONCE * LANES <= width; i += VALUES_AT_ONCE * LANES)
        sums_of_values(QUERIES, VALUES_AT_ONCE, 0, scores, room, values + i, keys, stride, to + i, inner);
    for (; i + LANES <= width; i += LANES) sums_of_values(QUERIES, 1, 0, scores, room, values + i, keys, stride, to + i, inner);
    if (i < width) sums_of_values(QUERIES, 0, width - i, scores, room, values + i, keys, stride, to + i, inner);
}

// Attention of queries `query` to `end` of one head of a source.
static void attend_to_keys(const Decoder *encoder, int64_t layer, int64_t source, int64_t head, int64_t query, int64_t end,
                           float *scores) {
    int64_t length = encoder->sources->length, keys = keys_to_read(encoder->sources->key_bias + source * length, length);
    for (; query + QUERIES_AT_ONCE <= end; query += QUERIES_AT_ONCE)
        attend(QUERIES_AT_ONCE, encoder, layer, source, head, query, keys, scores);
    for (; query < end; query++) attend(1, encoder, layer, source, head, query, keys, scores);
}

// Attention of a share's positions. Threads that share outputs take whatever is free.
static void attend_in_source(Decoder *encoder, int64_t layer, const Share *share) {
    int64_t heads = encoder->model.heads, length = encoder->sources->length, task;
    float *scores = encoder->scores + share->index * encoder->scores_room;
    if (!encoder->chunks) {
        int64_t pieces = (length + QUERIES_OF_TASK - 1) / QUERIES_OF_TASK, count = encoder->sources->batch * heads * pieces;
        while ((task = atomic_fetch_add(&encoder->tasks[layer], 1)) < count) {
            int64_t query = task % pieces * QUERIES_OF_TASK, end = query + QUERIES_OF_TASK;
            attend_to_keys(encoder, layer, task / pieces / heads, task / pieces % heads, query, end < length ? end : length, scores);
        }
        meet(encoder, share);
        return;
    }
    for (int64_t first = share->first, end; first < share->end; first = end) {
        int64_t source = first / length, begin = source * length;
        end = begin + length < share->end ? begin + length : share->end;
        for (int64_t head = 0; head < heads; head++)
            attend_to_keys(encoder, layer, source, head, first - begin, end - begin, scores);
    }
}

static void embed_sources(Decoder *encoder, const Share *share) {
    const Model *model = &encoder->model;
    const Sources *sources = encoder->sources;
    int64_t width = model->d_model;
    for (int64_t row = share->first + share->column; row < share->end; row += share->columns) {
        float *to = encoder->stream + row * width;
        if (sources->embeddings) memcpy(to, sources->embeddings + row * width, (size_t)width * sizeof *to);
        else look_up(model, sources->tokens[row], to);
    }
    meet(encoder, share);
}

// K and V of the decoder's layers: products of all groups with the same rows, whose parts of a head then go where attention reads them.
static void project_for_decoder(Decoder *encoder, const Share *share) {
    const Model *model = &encoder->model;
    const Sources *sources = encoder->sources;
    int64_t width = model->d_kv, heads = model->heads, inner = heads * width, length = sources->length, done = 0;
    Reading states = {AS_THEY_ARE, sources->hidden, model->d_model, NULL, 1.0f};
    Rows rows = prepare(encoder, &model->cross_kv[0], &states, share);
    for (int64_t g = 0; g < model->cross_groups; g++) {
        const Group *group = &model->cross_kv[g];
        float *inside = inside_of(encoder, share, group->outputs);
        multiply_rows(group, &rows, (Results){inside, group->outputs, 0}, share);
        meet(encoder, share);
        for (int64_t row = share->first + share->column; row < share->end; row += share->columns) {
            const float *from = inside + row * group->outputs;
            for (int64_t kind = done; kind < done + group->outputs / inner; kind++)
                for (int64_t head = 0; head < heads; head++, from += width) {
                    int64_t of_head = (kind * sources->batch + row / length) * heads + head;
                    memcpy(sources->cross + (of_head * length + row % length) * width, from, (size_t)width * sizeof *from);
                }
        }
        done += group->outputs / inner;
        meet(encoder, share);
    }
}

static void project_qkv(Decoder *encoder, int64_t l, const Share *share) {
    const Model *model = &encoder->model;
    const Layer *layer = &model->of[l];
    Reading normed = {NORMED, encoder->stream, model->d_model, layer->self_norm, 1.0f};
    lay_out_bias(encoder, l, share);
    multiply(encoder, &layer->qkv, &normed, (Results){made_of(encoder, l), 3 * model->heads * model->d_kv, 0}, share);
}

static void attend_and_feed_forward(Decoder *encoder, int64_t l, const Share *share) {
    const Model *model = &encoder->model;
    const Layer *layer = &model->of[l];
    int64_t width = model->d_model, inner = model->heads * model->d_kv, wide = inside_of_layer(model);
    float *inside = inside_of(encoder, share, wide);
    Results stream = {encoder->stream, width, 1};
    Reading mixed = {AS_THEY_ARE, encoder->mixed, inner, NULL, 1.0f}, activated = {ACTIVATED, inside, wide, NULL, 1.0f};
    Reading normed = {NORMED, encoder->stream, width, layer->feed_forward_norm, 1.0f};
    attend_in_source(encoder, l, share);
    multiply(encoder, &layer->self_o, &mixed, stream, share);
    multiply(encoder, &layer->wi, &normed, (Results){inside, wide, 0}, share);
    multiply(encoder, &layer->wo, &activated, stream, share);
}

static void normalize_states(Decoder *encoder, const Share *share) {
    const Model *model = &encoder->model;
    int64_t width = model->d_model;
    for (int64_t row = share->first + share->column; row < share->end; row += share->columns) {
        const float *from = encoder->stream + row * width;
        float factor = length_factor(from, width, model->epsilon);
        normalize(from, model->final_norm, factor, width, encoder->sources->hidden + row * width);
    }
    meet(encoder, share);
}

// What lies between two attentions: a position's own. Phase 0 begins with the sources, the last one ends with what the decoder reads.
static void encode_phase(Decoder *encoder, int64_t phase, const Share *share) {
    const Model *model = &encoder->model;
    if (has_source(encoder->sources)) {
        if (phase) attend_and_feed_forward(encoder, phase - 1, share);
        else embed_sources(encoder, share);
        if (phase < model->layers) project_qkv(encoder, phase, share);
        else normalize_states(encoder, share);
    }
    if (phase == model->layers && model->cross_groups) project_for_decoder(encoder, share);
}

static void encode(void *job, int index) {
    Decoder *encoder = job;
    int64_t phases = encoder->model.layers + 1, phase;
    Share share = share_of_outputs(encoder, index);
    if (!encoder->chunks)
        for (phase = 0; phase < phases; phase++) encode_phase(encoder, phase, &share);
    else
        for (; (phase = take_chunk(encoder, index, phases, &share)) < phases; end_chunk(encoder, phase))
            encode_phase(encoder, phase, &share);
}
