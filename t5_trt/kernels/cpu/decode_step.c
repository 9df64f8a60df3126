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

// The bias of each distance for all heads, the longest distance first: that of a row's keys in their order is a piece of it.
static void lay_out_distances(Decoder *decoder, int64_t layer, float *lines) {
    const Model *model = &decoder->model;
    for (int64_t head = 0; head < model->heads; head++, lines += decoder->lines_room)
        for (int64_t distance = 0; distance < decoder->lines_room; distance++) {
            int64_t place = distance < model->longest_distance ? distance : model->longest_distance;
            lines[decoder->lines_room - 1 - distance] = model->of[layer].bias[model->buckets[place] * model->heads + head];
        }
}

static void self_attention(const Decoder *decoder, const float *lines, int64_t layer, int64_t row, int64_t query, int64_t head, float *scores) {
    const Step *step = decoder->step;
    const Model *model = &decoder->model;
    int64_t inner = model->heads * model->d_kv, start = step->positions[row * step->position_step], position = start + query;
    int64_t keys = position + 1, index = row * step->queries + query, first = row / step->beams * step->beams;
    Places places = {step->ancestors ? step->ancestors + row * step->ancestors_row : NULL, row, first};
    const float *bias = lines + head * decoder->lines_room + decoder->lines_room - keys;
    scores_of(decoder->made + index * 3 * inner + head * model->d_kv, entry(&step->cache, layer, 0, 0, head), &places,
              &step->cache, keys, model->d_kv, scores);
    for (int64_t t = 0; t < keys; t++) scores[t] += bias[t];
    if (step->key_bias) {
        for (int64_t t = 0; t < keys; t++) scores[t] += step->key_bias[row * step->key_bias_row + t];
        // a query whose keys are all hidden reads all of them alike, later ones too, as in Hugging Face's class
        while (keys < start + step->queries) scores[keys++] = HIDDEN;
    }
    softmax(scores, keys);
    weighted_sum(scores, entry(&step->cache, layer, 1, 0, head), &places, &step->cache, keys, model->d_kv,
                 decoder->mixed + index * inner + head * model->d_kv);
}

// Of positions `index` to `end`, which read one source.
static void cross_attention(const Decoder *decoder, int64_t layer, int64_t index, int64_t end, int64_t head, float *scores) {
    const Step *step = decoder->step;
    const Model *model = &decoder->model;
    int64_t inner = model->heads * model->d_kv, source = index / (step->beams * step->queries);
    const float *bias = step->cross_bias + source * step->cross_bias_row;
    int64_t keys = keys_to_read(bias, step->source_length);
    Places places = {NULL, source, source};
    for (; index < end; index++) {
        scores_of(decoder->made + index * 3 * inner + head * model->d_kv, entry(&step->cross, layer, 0, 0, head), &places,
                  &step->cross, keys, model->d_kv, scores);
        for (int64_t t = 0; t < keys; t++) scores[t] += bias[t];
        softmax(scores, keys);
        weighted_sum(scores, entry(&step->cross, layer, 1, 0, head), &places, &step->cross, keys, model->d_kv,
                     decoder->mixed + index * inner + head * model->d_kv);
    }
}

// The next task of a share that has `count` of them: threads that share outputs take whichever is free.
static int64_t next_task(_Atomic int64_t *tasks, const Share *share, int64_t *done) {
    return share->columns > 1 ? atomic_fetch_add(tasks, 1) : (*done)++;
}

static void attend_to_self(Decoder *decoder, const float *lines, int64_t layer, const Share *share) {
    const Step *step = decoder->step;
    int64_t heads = decoder->model.heads, queries = step->queries, first = share->first * heads;
    int64_t count = share->end * heads - first, done = 0, task;
    float *scores = decoder->scores + share->index * decoder->scores_room;
    if (queries > 1) {  // a query reads what the queries before it keep
        for (task = first + share->column; task < first + count; task += share->columns)
            keep_new(decoder, layer, task / heads / queries, task / heads % queries, task % heads);
        meet(decoder, share);
    }
    while ((task = next_task(&decoder->tasks[2 * layer], share, &done)) < count) {
        int64_t position = (first + task) / heads, row = position / queries, query = position % queries, head = task % heads;
        if (queries == 1) keep_new(decoder, layer, row, query, head);
        self_attention(decoder, lines, layer, row, query, head, scores);
    }
    meet(decoder, share);
}

static void attend_to_source(Decoder *decoder, int64_t layer, const Share *share) {
    const Step *step = decoder->step;
    int64_t heads = decoder->model.heads, each = step->beams * step->queries, source = share->first / each, done = 0, task;
    int64_t count = ((share->end + each - 1) / each - source) * heads;
    float *scores = decoder->scores + share->index * decoder->scores_room;
    while ((task = next_task(&decoder->tasks[2 * layer + 1], share, &done)) < count) {
        int64_t begin = (source + task / heads) * each, end = begin + each;
        cross_attention(decoder, layer, begin > share->first ? begin : share->first, end < share->end ? end : share->end,
                        task % heads, scores);
    }
    meet(decoder, share);
}

// --- the step -------------------------------------------------------------------------------------------------------------------

static void embed(Decoder *decoder, const Share *share) {
    const Model *model = &decoder->model;
    for (int64_t row = share->first + share->column; row < share->end; row += share->columns)
        look_up(model, decoder->step->tokens[row], decoder->stream + row * model->d_model);
    meet(decoder, share);
}

static void multiply_by_head(Decoder *decoder, const Share *share) {
    const Model *model = &decoder->model;
    const Step *step = decoder->step;
    const RoughHead *rough = step->best_only ? model->rough : NULL;
    Reading normed = {NORMED, decoder->stream, model->d_model, model->final_norm, model->output_scale};
    Results logits = {step->logits, step->logits_row, 0};
    if (!rough) {
        multiply(decoder, &model->head, &normed, logits, share);
        return;
    }
    int threads = share->columns;
    int64_t count = share->end - share->first, width = model->d_model;
    float *to = step->logits + share->first * step->logits_row, *lengths = decoder->row_lengths + 2 * share->first;
    float *bests = decoder->bests + share->first * threads;
    Rows exact = prepare(decoder, &model->head, &normed, share), bytes = rows_of_share(decoder, &decoder->rough_rows, padded(width), share);
    for (int64_t row = share->column; row < count; row += threads) {
        round_row(&bytes, row, exact.floats + row * width, width);
        row_lengths(exact.floats + row * width, bytes.bytes + row * bytes.width, bytes.scales[row], width, &lengths[2 * row],
                    &lengths[2 * row + 1]);
    }
    meet(decoder, share);
    multiply_rows(&rough->group, &bytes, logits, share);
    meet(decoder, share);
    int64_t first = model->vocabulary * share->column / threads, end = model->vocabulary * (share->column + 1) / threads;
    for (int64_t row = 0; row < count; row++) {
        float *of_row = to + row * step->logits_row;
        for (int64_t i = 0; i < step->hidden_count; i++)
            if (step->hidden[i] >= first && step->hidden[i] < end) of_row[step->hidden[i]] = -INFINITY;
        bests[row * threads + share->column] = least_best(rough, of_row, first, end, lengths[2 * row], lengths[2 * row + 1]);
    }
    meet(decoder, share);
    for (int64_t row = 0; row < count; row++) {
        float best = -INFINITY;
        for (int t = 0; t < threads; t++) best = fmaxf(best, bests[row * threads + t]);
        refine(rough, &model->head.parts[0], exact.floats + row * width, width, best, first, end, lengths[2 * row],
               lengths[2 * row + 1], to + row * step->logits_row);
    }
    meet(decoder, share);
}

static void decode_share(Decoder *decoder, const Share *share) {
    const Model *model = &decoder->model;
    int64_t inner = model->heads * model->d_kv, wide = inside_of_layer(model);
    float *inside = inside_of(decoder, share, wide);
    Results stream = {decoder->stream, model->d_model, 1};
    Reading mixed = {AS_THEY_ARE, decoder->mixed, inner, NULL, 1.0f}, activated = {ACTIVATED, inside, wide, NULL, 1.0f};
    float *lines = decoder->lines + share->index * model->heads * decoder->lines_room;
    embed(decoder, share);
    for (int64_t l = 0; l < model->layers; l++) {
        const Layer *layer = &model->of[l];
        Reading normed = {NORMED, decoder->stream, model->d_model, layer->self_norm, 1.0f};
        multiply(decoder, &layer->qkv, &normed, (Results){decoder->made, 3 * inner, 0}, share);
        if (!l || layer->bias != model->of[l - 1].bias) lay_out_distances(decoder, l, lines);
        attend_to_self(decoder, lines, l, share);
        multiply(decoder, &layer->self_o, &mixed, stream, share);
        normed.norm = layer->cross_norm;
        multiply(decoder, &layer->cross_q, &normed, (Results){decoder->made, 3 * inner, 0}, share);
        attend_to_source(decoder, l, share);
        multiply(decoder, &layer->cross_o, &mixed, stream, share);
        normed.norm = layer->feed_forward_norm;
        multiply(decoder, &layer->wi, &normed, (Results){inside, wide, 0}, share);
        multiply(decoder, &layer->wo, &activated, stream, share);
    }
    multiply_by_head(decoder, share);
}

static void decode(void *job, int index) {
    Decoder *decoder = job;
    Share share = share_of_outputs(decoder, index);
    if (!decoder->chunks) decode_share(decoder, &share);
    else
        while (!take_chunk(decoder, index, 1, &share)) decode_share(decoder, &share);
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
    decoder->tasks = calloc((size_t)(2 * model->layers + 2), sizeof *decoder->tasks);
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
    cut(encoder, 1);
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
    cut(decoder, step->queries);
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
