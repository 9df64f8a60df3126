// The decoder of a T5 on a CPU: new tokens of some rows, over caches in float32, to their logits.
#include "threads.h"
#include <sys/mman.h>
#include "attention.h"
#include "products.h"
#include "tokens.h"

// what a mask adds to the score of a hidden key: any score and this are this
static const float HIDDEN = -1e30f;

enum { RELU = 0, GELU_NEW = 1, GELU = 2, SILU = 3 };
enum { PRIVATE = 8192 };  // numbers that every thread makes for itself, rather than a share of them and a barrier more

typedef struct {
    Group qkv, self_o, cross_q, cross_o, wi, wo;
    const float *self_norm, *cross_norm, *feed_forward_norm;
    const float *bias;  // [buckets, heads]
} Layer;

typedef struct {
    int64_t d_model, d_kv, heads, d_ff, layers, vocabulary, longest_distance;
    int32_t activation, gated, embedding_type;
    float epsilon, output_scale;
    const void *embedding;   // [vocabulary, d_model]
    const int32_t *buckets;  // of distances 0 to longest_distance
    const float *final_norm;
    Group head;
    Layer *of;
} Model;

// One call: `queries` new tokens for each of `rows` rows.
typedef struct {
    int64_t rows, queries, beams;
    const int64_t *tokens;     // [rows, queries]
    const int64_t *positions;  // of the first new token, one for each row or, with a step of 0, for all
    int64_t position_step;
    Cache cache;
    const uint8_t *ancestors;  // [rows, ancestors_row]; NULL where rows have their own cache
    int64_t ancestors_row;
    const float *key_bias;  // [rows, key_bias_row], added to scores; NULL for none
    int64_t key_bias_row;
    Cache cross;
    const float *cross_bias;  // [rows / beams, cross_bias_row]
    int64_t cross_bias_row, source_length;
    float *logits;  // [rows * queries, logits_row]
    int64_t logits_row;
} Step;

typedef struct {
    Team team;
    Model model;
    int64_t room;          // positions that the buffers below hold
    int64_t scores_room;   // floats of a thread's scores
    float *stream, *made, *mixed, *scores;
    Rows shared, *own;     // rows for products: of all threads, and each thread's
    _Atomic int64_t *tasks;  // counters of the attentions of a step
    const Step *step;
} Decoder;

// --- rows for products ----------------------------------------------------------------------------------------------------------

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

static void prepare_row(const Decoder *decoder, const Group *group, const Reading *reading, int64_t row, const Rows *rows) {
    const Model *model = &decoder->model;
    const float *from = reading->from + row * reading->stride;
    float *to = rows->floats + (group->type == INT8 ? 0 : row * rows->width);  // rounded at once: room for one will do
    if (reading->source == NORMED)
        normalize(from, reading->norm, length_factor(from, group->inputs, model->epsilon) * reading->scale, group->inputs, to);
    else if (reading->source == ACTIVATED) activate(model, from, to);
    else if (group->type == INT8) to = (float *)from;
    else memcpy(to, from, (size_t)group->inputs * sizeof *to);
    if (group->type == INT8) round_row(rows, row, to, group->inputs);
}

// The rows that a group reads: few are made by every thread, many by all threads together.
static Rows prepare(Decoder *decoder, const Group *group, const Reading *reading, int64_t count, int index) {
    int threads = decoder->team.count;
    Rows rows = decoder->own[index];
    rows.width = group->type == INT8 ? padded(group->inputs) : group->inputs;
    if (count * group->inputs <= PRIVATE || threads == 1) {
        for (int64_t row = 0; row < count; row++) prepare_row(decoder, group, reading, row, &rows);
        return rows;
    }
    Rows shared = decoder->shared;
    shared.width = rows.width;
    Rows mine = shared;
    if (group->type == INT8) mine.floats = rows.floats;  // where this thread makes a row before it is rounded
    for (int64_t row = index; row < count; row += threads) prepare_row(decoder, group, reading, row, &mine);
    barrier(&decoder->team);
    return shared;
}

static void multiply(Decoder *decoder, const Group *group, const Reading *reading, Results results, int index) {
    int64_t count = decoder->step->rows * decoder->step->queries;
    Rows rows = prepare(decoder, group, reading, count, index);
    product(group, &rows, count, results, index, decoder->team.count);
    barrier(&decoder->team);
}

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

// Keys of a batch entry up to the last one that is not hidden; all of them if all are hidden.
static int64_t keys_of(const Step *step, int64_t source) {
    const float *bias = step->cross_bias + source * step->cross_bias_row;
    int64_t keys = step->source_length;
    while (keys > 0 && bias[keys - 1] <= HIDDEN) keys--;
    return keys ? keys : step->source_length;
}

static void cross_attention(const Decoder *decoder, int64_t layer, int64_t source, int64_t head, float *scores) {
    const Step *step = decoder->step;
    const Model *model = &decoder->model;
    int64_t inner = model->heads * model->d_kv, keys = keys_of(step, source), each = step->beams * step->queries;
    const float *bias = step->cross_bias + source * step->cross_bias_row;
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
        for (task = index; task < count; task += decoder->team.count)
            keep_new(decoder, layer, task / heads / queries, task / heads % queries, task % heads);
        barrier(&decoder->team);
    }
    while ((task = atomic_fetch_add(&decoder->tasks[2 * layer], 1)) < count) {
        int64_t row = task / heads / queries, query = task / heads % queries, head = task % heads;
        if (queries == 1) keep_new(decoder, layer, row, query, head);
        self_attention(decoder, layer, row, query, head, scores);
    }
    barrier(&decoder->team);
}

static void attend_to_source(Decoder *decoder, int64_t layer, int index) {
    const Step *step = decoder->step;
    int64_t heads = decoder->model.heads, count = step->rows / step->beams * heads, task;
    float *scores = decoder->scores + index * decoder->scores_room;
    while ((task = atomic_fetch_add(&decoder->tasks[2 * layer + 1], 1)) < count)
        cross_attention(decoder, layer, task / heads, task % heads, scores);
    barrier(&decoder->team);
}

// --- the step -------------------------------------------------------------------------------------------------------------------

static void embed(Decoder *decoder, int index) {
    const Model *model = &decoder->model;
    const Step *step = decoder->step;
    for (int64_t row = index; row < step->rows * step->queries; row += decoder->team.count) {
        float *to = decoder->stream + row * model->d_model;
        int64_t from = step->tokens[row] * model->d_model;
        for (int64_t i = 0; i < model->d_model; i++) to[i] = one_weight(model->embedding_type, model->embedding, from + i);
    }
    barrier(&decoder->team);
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
    Reading normed = {NORMED, decoder->stream, model->d_model, model->final_norm, model->output_scale};
    multiply(decoder, &model->head, &normed, (Results){decoder->step->logits, decoder->step->logits_row, 0}, index);
}

// --- memory ---------------------------------------------------------------------------------------------------------------------

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

static int make_room(Decoder *decoder, const Step *step) {
    const Model *model = &decoder->model;
    int64_t inner = model->heads * model->d_kv, wide = model->d_ff * (model->gated ? 2 : 1), threads = decoder->team.count;
    int64_t count = step->rows * step->queries, widest = inner > model->d_ff ? inner : model->d_ff;
    widest = padded(widest > model->d_model ? widest : model->d_model);
    int64_t narrowest = inner < model->d_ff ? inner : model->d_ff;
    narrowest = narrowest < model->d_model ? narrowest : model->d_model;
    int64_t keys = step->source_length;
    for (int64_t row = 0; row < step->rows; row++) {
        int64_t own = step->positions[row * step->position_step] + step->queries;
        keys = own > keys ? own : keys;
    }
    if (count > decoder->room) {
        decoder->room = 0;
        int64_t made = 3 * inner > wide ? 3 * inner : wide;
        int fits = grow(&decoder->stream, count * model->d_model * 4) && grow(&decoder->made, count * made * 4) &&
                   grow(&decoder->mixed, count * inner * 4) && grow_rows(&decoder->shared, count, widest);
        int64_t few = threads == 1 || count < PRIVATE / narrowest ? count : PRIVATE / narrowest + 1;
        for (int t = 0; fits && t < threads; t++) fits = grow_rows(&decoder->own[t], few, widest);
        if (!fits) return 0;
        decoder->room = count;
    }
    if (keys + LANES > decoder->scores_room) {
        decoder->scores_room = 0;
        int64_t room = (2 * keys + LANES + 63) / 64 * 64;
        if (!grow(&decoder->scores, room * threads * 4)) return 0;
        decoder->scores_room = room;
    }
    for (int64_t i = 0; i < 2 * model->layers; i++) atomic_store(&decoder->tasks[i], 0);
    return 1;
}

// --- what Python calls ----------------------------------------------------------------------------------------------------------

void t5_close(Decoder *decoder) {
    close_team(&decoder->team);
    free(decoder->stream), free(decoder->made), free(decoder->mixed), free(decoder->scores), free(decoder->tasks);
    for (int t = -1; decoder->own && t < decoder->team.count; t++) {
        Rows *rows = t < 0 ? &decoder->shared : &decoder->own[t];
        free(rows->floats), free(rows->bytes), free(rows->scales), free(rows->sums);
    }
    free(decoder->own);
    free(decoder);
}

// A decoder over weights that the caller keeps; NULL if memory runs out.
Decoder *t5_open(const Model *model, int threads, int spinning) {
    Decoder *decoder = calloc(1, sizeof *decoder);
    if (!decoder) return NULL;
    decoder->model = *model;
    open_team(&decoder->team, threads, spinning ? LOOKS_SPINNING : LOOKS_BRIEF);
    decoder->own = calloc((size_t)decoder->team.count, sizeof *decoder->own);
    decoder->tasks = calloc((size_t)(2 * model->layers), sizeof *decoder->tasks);
    if (decoder->own && decoder->tasks) return decoder;
    t5_close(decoder);
    return NULL;
}

// Run a step; 0 if memory runs out.
int t5_decode(Decoder *decoder, const Step *step) {
    take_team(&decoder->team);
    int fits = make_room(decoder, step);
    decoder->step = step;
    if (fits) run_job(&decoder->team, decode, decoder);
    give_team_back(&decoder->team);
    return fits;
}

// Let the system give large pages for memory that is not written to yet, which halves the misses of address translation.
void t5_large_pages(void *memory, int64_t bytes) {
    const uintptr_t large = 1 << 21, start = ((uintptr_t)memory + large - 1) & ~(large - 1);
    const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) & ~(large - 1);
#ifdef MADV_HUGEPAGE
    if (start < end) madvise((void *)start, end - start, MADV_HUGEPAGE);
#endif
}

void t5_pack(const uint8_t *from, int64_t inputs, int64_t columns, int shifted, uint8_t *to) {
    pack(from, inputs, columns, shifted, to, 0, (columns + TILE - 1) / TILE);
}
