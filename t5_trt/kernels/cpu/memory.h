// The memory of a decoder, which grows with the largest call.
#pragma once
#include "decoder.h"

static int grow(void *place, int64_t bytes) {
    void **to = place;
    free(*to);
    *to = aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64));
    return *to != NULL;
}

static int grow_rows(Rows *rows, int64_t count, int64_t width) {
    return grow(&rows->floats, count * width * 4) && grow(&rows->bytes, count * width) && grow(&rows->scales, count * 4) &&
           grow(&rows->sums, count * 4);
}

// Numbers inside of a feed-forward layer, the gate's among them.
static int64_t inside_of_layer(const Model *model) { return model->d_ff * (model->gated ? 2 : 1); }

// Room for `count` positions, with `wide` numbers each in `inside` and q, k and v of `layers` layers.
static int make_room_for_rows(Decoder *decoder, int64_t count, int64_t wide, int layers) {
    const Model *model = &decoder->model;
    int64_t inner = model->heads * model->d_kv, threads = decoder->team->count;
    int64_t widest = inner > model->d_ff ? inner : model->d_ff, narrowest = inner < model->d_ff ? inner : model->d_ff;
    widest = padded(widest > model->d_model ? widest : model->d_model);
    narrowest = narrowest < model->d_model ? narrowest : model->d_model;
    decoder->count = count, decoder->widest = widest, decoder->inside_width = wide;
    if (count <= decoder->room) return 1;
    decoder->room = 0;
    int fits = grow(&decoder->stream, count * model->d_model * 4) && grow(&decoder->inside, count * wide * 4) &&
               grow(&decoder->made, layers * count * 3 * inner * 4) && grow(&decoder->mixed, count * inner * 4) &&
               grow_rows(&decoder->shared, count, widest) &&
               grow_rows(&decoder->rough_rows, count, widest) && grow(&decoder->row_lengths, count * 8) &&
               grow(&decoder->bests, count * threads * 4);
    int64_t few = threads == 1 || count < PRIVATE / narrowest ? count : PRIVATE / narrowest + 1;
    for (int t = 0; fits && t < threads; t++) fits = grow_rows(&decoder->own[t], few, widest);
    decoder->own_room = few;
    if (fits) decoder->room = count;
    return fits;
}

// Room for `count` scores of each thread, and a vector more.
static int make_room_for_scores(Decoder *decoder, int64_t count) {
    if (count + LANES <= decoder->scores_room) return 1;
    decoder->scores_room = 0;
    int64_t room = (2 * count + LANES + 63) / 64 * 64;
    if (!grow(&decoder->scores, room * decoder->team->count * 4)) return 0;
    decoder->scores_room = room;
    return 1;
}

// Room for the bias of each head by distance, some times.
static int make_room_for_lines(Decoder *decoder, int64_t distances, int64_t times) {
    if (distances <= decoder->lines_room) return 1;
    decoder->lines_room = 0;
    int64_t room = (2 * distances + LANES - 1) / LANES * LANES;
    if (!grow(&decoder->lines, times * decoder->model.heads * room * 4)) return 0;
    decoder->lines_room = room;
    return 1;
}

static int make_room(Decoder *decoder, const Step *step) {
    const Model *model = &decoder->model;
    int64_t keys = step->source_length, own = 0;
    for (int64_t row = 0; row < step->rows; row++) {
        int64_t of_row = step->positions[row * step->position_step] + step->queries;
        own = of_row > own ? of_row : own;
    }
    keys = own > keys ? own : keys;
    if (!make_room_for_lines(decoder, own, decoder->team->count)) return 0;
    for (int64_t i = 0; i < 2 * model->layers; i++) atomic_store(&decoder->tasks[i], 0);
    return make_room_for_rows(decoder, step->rows * step->queries, inside_of_layer(model), 1) && make_room_for_scores(decoder, keys);
}

static void free_rows(Rows *rows) { free(rows->floats), free(rows->bytes), free(rows->scales), free(rows->sums); }

static void close_decoder(Decoder *decoder) {
    for (int t = 0; decoder->own && t < decoder->team->count; t++) free_rows(&decoder->own[t]);
    free_rows(&decoder->shared);
    free_rows(&decoder->rough_rows);
    free(decoder->stream), free(decoder->made), free(decoder->inside), free(decoder->mixed), free(decoder->scores), free(decoder->tasks);
    free(decoder->bests), free(decoder->row_lengths), free(decoder->own), free(decoder->lines);
    free(decoder);
}
