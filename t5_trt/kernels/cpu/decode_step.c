// A T5 on a CPU. The decoder: new tokens of some rows, over caches in float32, to their logits. The encoder is in encoder.h.
#include "memory.h"
#include "rows.h"
#include "tokens.h"
#include "encoder.h"
#include <sys/mman.h>

// --- attention ------------------------------------------------------------------------------------------------------------------

static void keep_new(const Decoder *decoder, int64_t layer, int64_t row, int64_t query, int64_t head) {
    const Step *step = decoder->step;
    const Model *model = &decoder->model;
    int64_t inner = model->heads * model->d_kv, position = step->positions[row * step->position_step] + query;
    const float *made = decoder->made + (row * step->queries + query) * 3 * inner + inner + head * model->d_kv;
    for (int kind = 0; kind < 2; kind++, made += inner)
        memcpy(entry(&step->cache, layer, kind, row, head) + position * model->d_kv, made, (size_t)model->d_kv * sizeof *made);
}

static void self_attention(const Decoder *decoder, int64_t layer, int64_t row, int64_t query, int64_t head, float *scores) {
    const Step *step = decoder->step;
    const Model *model = &decoder->model;
    int64_t inner = model->heads * model->d_kv, start = step->positions[row * step->position_step], position = start + query;
    int64_t keys = position + 1, index = row * step->queries + query, first = row / step->beams * step->beams;
    Places places = {step->ancestors ? step->ancestors + row * step->ancestors_row : NULL, row, first};
    const float *bias = model->of[layer].bias;
    scores_of(decoder->made + index * 3 * inner + head * model->d_kv, entry(&step->cache, layer, 0, 0, head), &places,
              &step->cache, keys, model->d_kv, scores);
    for (int64_t t = 0; t < keys; t++) {
        int64_t distance = position - t < model->longest_distance ? position - t : model->longest_distance;
        scores[t] += bias[model->buckets[distance] * model->heads + head];
    }
    if (step->key_bias) {
        for (int64_t t = 0; t < keys; t++) scores[t] += step->key_bias[row * step->key_bias_row + t];
        // a query whose keys are all hidden reads all of them alike, later ones too, as in Hugging Face's class
        while (keys < start + step->queries) scores[keys++] = HIDDEN;
    }
    softmax(scores, keys);
    weighted_sum(scores, entry(&step->cache, layer, 1, 0, head), &places, &step->cache, keys, model->d_kv,
                 decoder->mixed + index * inner + head * model->d_kv);
}

static void cross_attention(const Decoder *decoder, int64_t layer, int64_t source, int64_t head, float *scores) {
    const Step *step = decoder->step;
    const Model *model = &decoder->model;
    const float *bias = step->cross_bias + source * step->cross_bias_row;
    int64_t inner = model->heads * model->d_kv, keys = keys_to_read(bias, step->source_length), each = step->beams * step->queries;
    Places places = {NULL, source, source};
    for (int64_t index = source * each; index < (source + 1) * each; index++) {
        scores_of(decoder->made + index * inner + head * model->d_kv, entry(&step->cross, layer, 0, 0, head), &places,
                  &step->cross, keys, model->d_kv, scores);
        for (int64_t t = 0; t < keys; t++) scores[t] += bias[t];
        softmax(scores, keys);
        weighted_sum(scores, entry(&step->cross, layer, 1, 0, head), &places, &step->cross, keys, model->d_kv,
                     decoder->mixed + index * inner + head * model->d_kv);
    }
}

static void attend_to_self(Decoder *decoder, int64_t layer, int index) {
    const Step *step = decoder->step;
    int64_t heads = decoder->model.heads, queries = step->queries, count = step->rows * queries * heads, task;
    float *scores = decoder->scores + index * decoder->scores_room;
    if (queries > 1) {  // a query reads what the queries before it keep
        for (task = index; task < count; task += decoder->team->count)
            keep_new(decoder, layer, task / heads / queries, task / heads % queries, task % heads);
        barrier(decoder->team);
    }
    while ((task = atomic_fetch_add(&decoder->tasks[2 * layer], 1)) < count) {
        int64_t row = task / heads / queries, query = task / heads % queries, head = task % heads;
        if (queries == 1) keep_new(decoder, layer, row, query, head);
        self_attention(decoder, layer, row, query, head, scores);
    }
    barrier(decoder->team);
}

static void attend_to_source(Decoder *decoder, int64_t layer, int index) {
    const Step *step = decoder->step;
    int64_t heads = decoder->model.heads, count = step->rows / step->beams * heads, task;
    float *scores = decoder->scores + index * decoder->scores_room;
    while ((task = atomic_fetch_add(&decoder->tasks[2 * layer + 1], 1)) < count)
        cross_attention(decoder, layer, task / heads, task % heads, scores);
    barrier(decoder->team);
}

// --- the step -------------------------------------------------------------------------------------------------------------------

static void embed(Decoder *decoder, int index) {
    const Model *model = &decoder->model;
    const Step *step = decoder->step;
    for (int64_t row = index; row < step->rows * step->queries; row += decoder->team->count) {
        look_up(model, step->tokens[row], decoder->stream + row * model->d_model);
    }
    barrier(decoder->team);
}

static void multiply_by_head(Decoder *decoder, int index) {
    const Model *model = &decoder->model;
    const Step *step = decoder->step;
    const RoughHead *rough = step->best_only ? model->rough : NULL;
    Reading normed = {NORMED, decoder->stream, model->d_model, model->final_norm, model->output_scale};
    Results logits = {step->logits, step->logits_row, 0};
    if (!rough) {
        multiply(decoder, &model->head, &normed, logits, index);
        return;
    }
    int threads = decoder->team->count;
    int64_t count = step->rows * step->queries, width = model->d_model;
    Rows exact = prepare(decoder, &model->head, &normed, count, index), bytes = decoder->rough_rows;
    bytes.width = padded(width);
    for (int64_t row = index; row < count; row += threads) {
        round_row(&bytes, row, exact.floats + row * width, width);
        row_lengths(exact.floats + row * width, bytes.bytes + row * bytes.width, bytes.scales[row], width,
                    &decoder->row_lengths[2 * row], &decoder->row_lengths[2 * row + 1]);
    }
    barrier(decoder->team);
    product(&rough->group, &bytes, count, logits, index, threads);
    barrier(decoder->team);
    int64_t first = model->vocabulary * index / threads, end = model->vocabulary * (index + 1) / threads;
    for (int64_t row = 0; row < count; row++) {
        float *to = step->logits + row * step->logits_row, *lengths = decoder->row_lengths + 2 * row;
        for (int64_t i = 0; i < step->hidden_count; i++)
            if (step->hidden[i] >= first && step->hidden[i] < end) to[step->hidden[i]] = -INFINITY;
        decoder->bests[row * threads + index] = least_best(rough, to, first, end, lengths[0], lengths[1]);
    }
    barrier(decoder->team);
    for (int64_t row = 0; row < count; row++) {
        float best = -INFINITY, *lengths = decoder->row_lengths + 2 * row;
        for (int t = 0; t < threads; t++) best = fmaxf(best, decoder->bests[row * threads + t]);
        refine(rough, &model->head.parts[0], exact.floats + row * width, width, best, first, end, lengths[0], lengths[1],
               step->logits + row * step->logits_row);
    }
    barrier(decoder->team);
}

static void decode(void *job, int index) {
    Decoder *decoder = job;
    const Model *model = &decoder->model;
    int64_t inner = model->heads * model->d_kv, wide = model->d_ff * (model->gated ? 2 : 1);
    Results stream = {decoder->stream, model->d_model, 1};
    Reading mixed = {AS_THEY_ARE, decoder->mixed, inner, NULL, 1.0f}, activated = {ACTIVATED, decoder->made, wide, NULL, 1.0f};
    embed(decoder, index);
    for (int64_t l = 0; l < model->layers; l++) {
        const Layer *layer = &model->of[l];
        Reading normed = {NORMED, decoder->stream, model->d_model, layer->self_norm, 1.0f};
        multiply(decoder, &layer->qkv, &normed, (Results){decoder->made, 3 * inner, 0}, index);
        attend_to_self(decoder, l, index);
        multiply(decoder, &layer->self_o, &mixed, stream, index);
        normed.norm = layer->cross_norm;
        multiply(decoder, &layer->cross_q, &normed, (Results){decoder->made, inner, 0}, index);
        attend_to_source(decoder, l, index);
        multiply(decoder, &layer->cross_o, &mixed, stream, index);
        normed.norm = layer->feed_forward_norm;
        multiply(decoder, &layer->wi, &normed, (Results){decoder->made, wide, 0}, index);
        multiply(decoder, &layer->wo, &activated, stream, index);
    }
    multiply_by_head(decoder, index);
}

// --- what Python calls ----------------------------------------------------------------------------------------------------------

// Threads for decoders and encoders, which run one call at a time; NULL if memory runs out.
Team *t5_open_team(int threads, int spinning) {
    Team *team = malloc(sizeof *team);
    if (!team) return NULL;
    open_team(team, threads, spinning ? LOOKS_SPINNING : LOOKS_BRIEF);
    team->users = 1;
    return team;
}

void t5_close_team(Team *team) {
    if (atomic_fetch_sub(&team->users, 1) > 1) return;
    close_team(team);
    free(team);
}

void t5_close(Decoder *decoder) {
    Team *team = decoder->team;
    close_decoder(decoder);
    t5_close_team(team);
}

// A decoder or an encoder over weights that the caller keeps; NULL if memory runs out.
Decoder *t5_open(const Model *model, Team *team) {
    Decoder *decoder = calloc(1, sizeof *decoder);
    if (!decoder) return NULL;
    decoder->model = *model;
    decoder->team = team;
    atomic_fetch_add(&team->users, 1);
    decoder->own = calloc((size_t)team->count, sizeof *decoder->own);
    decoder->tasks = calloc((size_t)(2 * model->layers), sizeof *decoder->tasks);
    if (decoder->own && decoder->tasks) return decoder;
    t5_close(decoder);
    return NULL;
}

static int are_in_vocabulary(const Model *model, const int64_t *tokens, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= model->vocabulary) return 0;
    return 1;
}

// Encode sources, and compute K and V of the decoder's layers: 1; 0 if memory runs out, -1 if a token is not in the vocabulary.
int t5_encode(Decoder *encoder, const Sources *sources) {
    if (sources->tokens && !are_in_vocabulary(&encoder->model, sources->tokens, sources->batch * sources->length)) return -1;
    take_team(encoder->team);
    int fits = make_room_for_sources(encoder, sources);
    encoder->sources = sources;
    if (fits) run_job(encoder->team, encode, encoder);
    give_team_back(encoder->team);
    return fits;
}

// Run a step: 1; 0 if memory runs out, -1 if a token is not in the vocabulary.
int t5_decode(Decoder *decoder, const Step *step) {
    if (!are_in_vocabulary(&decoder->model, step->tokens, step->rows * step->queries)) return -1;
    take_team(decoder->team);
    int fits = make_room(decoder, step);
    decoder->step = step;
    if (fits) run_job(decoder->team, decode, decoder);
    give_team_back(decoder->team);
    return fits;
}

// Use a rough head from the next step on, see rough_head.h; NULL for none.
void t5_use_rough_head(Decoder *decoder, const RoughHead *rough) {
    take_team(decoder->team);
    decoder->model.rough = rough;
    give_team_back(decoder->team);
}

// Let the system give large pages for memory that is not written to yet, which halves the misses of address translation.
void t5_large_pages(void *memory, int64_t bytes) {
    const uintptr_t large = 1 << 21, start = ((uintptr_t)memory + large - 1) & ~(large - 1);
    const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) & ~(large - 1);
#ifdef MADV_HUGEPAGE
    if (start < end) madvise((void *)start, end - start, MADV_HUGEPAGE);
#endif
}
