// What a decoder is, or an encoder: its weights, the memory of a call, and the memory that threads share.
#pragma once
#include "threads.h"
#include "rough_head.h"

// what a mask adds to the score of a hidden key: any score and this are this
static const float HIDDEN = -1e30f;

// Keys up to the last one that a mask does not hide; all of them if all are hidden.
static int64_t keys_to_read(const float *bias, int64_t length) {
    int64_t keys = length;
    while (keys > 0 && bias[keys - 1] <= HIDDEN) keys--;
    return keys ? keys : length;
}

enum { RELU = 0, GELU_NEW = 1, GELU = 2, SILU = 3 };
enum { CHUNK = 24 };      // positions of a chunk, or up to twice as many
enum { PRIVATE = 8192 };  // numbers that every thread makes for itself, rather than a share of them and a barrier more

// Of an encoder, what is for cross-attention is empty.
typedef struct {
    Group qkv, self_o, cross_q, cross_o, wi, wo;
    const float *self_norm, *cross_norm, *feed_forward_norm;
    const float *bias;  // [buckets, heads]
} Layer;

typedef struct {
    int64_t d_model, d_kv, heads, d_ff, layers, vocabulary, longest_distance;
    int32_t activation, gated, embedding_type;
    int32_t by_rows;         // threads take rows rather than outputs, see `Share`
    float epsilon, output_scale;
    const void *embedding;   // [vocabulary, d_model]
    const int32_t *buckets;  // of distances 0 to longest_distance; of an encoder from -longest_distance on
    const float *final_norm;
    Group head;
    Layer *of;
    const RoughHead *rough;  // NULL if all logits are always computed by `head`
    const Group *cross_kv;   // of an encoder: K and V of the decoder's layers, one group after the other
    int64_t cross_groups;
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
    // Only the place of the largest logit is wanted, of those that are not hidden: others may be off, but stay smaller.
    int64_t best_only, hidden_count;
    const int64_t *hidden;
} Step;

// One call of an encoder: B sources of S tokens.
typedef struct {
    int64_t batch, length;
    const int64_t *tokens;  // [B, S]; NULL where there are embeddings or states
    const float *embeddings;  // [B, S, E]; NULL where there are tokens or states
    const float *key_bias;  // [B, S], added to scores
    float *hidden;          // [B, S, E], states after the last norm: written, or where there are neither tokens nor embeddings, read
    float *cross;           // [layers of the decoder, 2, B, H, S, D], written
} Sources;

typedef struct {
    Team *team;
    Model model;
    int64_t count;         // positions of the call
    int64_t room;          // positions that the buffers below hold
    int64_t scores_room;   // floats of a thread's scores
    float *stream, *mixed, *scores;
    float *made;           // [positions, 3 heads d_kv]: q, k and v; of an encoder twice, for layers in turn
    float *inside;         // [positions, inside_width]
    int64_t inside_width;
    Rows shared, *own;     // rows for products: of all threads, and each thread's
    int64_t own_room, widest;  // rows that `own` holds; numbers that each of these rows has room for
    Rows rough_rows;       // for the rough head
    float *row_lengths;    // [positions, 2], of the rows for the rough head
    float *bests;            // [positions, threads]
    int64_t chunks, positions_of_row;  // of the call, see `cut`
    _Atomic int64_t taken;             // chunks of all phases
    _Atomic int64_t *tasks;  // counters: tasks of attentions that are taken, or chunks of phases that are done
    float *lines;            // bias by distance, [heads, lines_room]: of an encoder twice, for layers in turn; of a decoder for each thread
    int64_t lines_room;
    const Step *step;
    const Sources *sources;
} Decoder;

// What a thread does of a call at a time. Either threads share the outputs of each product, and meet behind it: each reads a part of the
// weights. Or a thread takes a chunk of the positions through all products, and reads all weights. Where these stay in the caches, that
// saves the exchange of rows, which takes longer than the products if the threads' cores have no cache in common; and whoever is free
// takes the next chunk, so that a thread that is busy elsewhere is not waited for.
typedef struct {
    int index;            // of the thread
    int column, columns;  // its share of outputs
    int64_t first, end;   // its positions
} Share;

static Share share_of_outputs(const Decoder *decoder, int index) {
    return (Share){index, index, decoder->team->count, 0, decoder->count};
}

// Wait for all threads that share the outputs of a product.
static void meet(Decoder *decoder, const Share *share) {
    if (share->columns > 1) barrier(decoder->team);
}

// Choose how many chunks threads take, 0 if they share outputs. Positions of a row stay together.
static void cut(Decoder *decoder, int64_t positions_of_row) {
    int64_t threads = decoder->team->count, rows = decoder->count / positions_of_row;
    decoder->positions_of_row = positions_of_row;
    decoder->chunks = 0;
    if (decoder->model.by_rows && threads > 1 && rows >= threads) {
        int64_t each = decoder->count / (threads * CHUNK);
        decoder->chunks = threads * (each < 1 ? 1 : each);
        if (decoder->chunks > rows) decoder->chunks = rows;
    }
    atomic_store(&decoder->taken, 0);
}

// Take the next chunk of the next of some phases, once all of the phase before is done. Returns the phase; `phases` if none is left.
static int64_t take_chunk(Decoder *decoder, int index, int64_t phases, Share *share) {
    int64_t chunks = decoder->chunks, taken = atomic_fetch_add(&decoder->taken, 1), phase = taken / chunks, chunk = taken % chunks;
    if (phase >= phases) return phases;
    int64_t rows = decoder->count / decoder->positions_of_row, each = decoder->positions_of_row;
    *share = (Share){index, 0, 1, rows * chunk / chunks * each, rows * (chunk + 1) / chunks * each};
    Team *team = decoder->team;
    for (unsigned seen; phase > 0 && (seen = atomic_load(&team->phase.count), atomic_load(&decoder->tasks[phase - 1]) < chunks);)
        wait_for(&team->phase, seen, team->looks);
    return phase;
}

static void end_chunk(Decoder *decoder, int64_t phase) {
    if (atomic_fetch_add(&decoder->tasks[phase], 1) + 1 == decoder->chunks) announce(&decoder->team->phase);
}

// Where a share keeps what is inside of a feed-forward layer, `width` numbers for each position; other shares are not in its way,
// whatever width theirs have.
static float *inside_of(const Decoder *decoder, const Share *share, int64_t width) {
    return decoder->inside + share->first * (decoder->inside_width - width);
}
