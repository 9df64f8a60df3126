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
    float *stream, *made, *mixed, *scores;
    Rows shared, *own;     // rows for products: of all threads, and each thread's
    Rows rough_rows;       // for the rough head
    float *row_lengths;    // [positions, 2], of the rows for the rough head
    float *bests;            // [positions, threads]
    _Atomic int64_t *tasks;  // counters of the attentions of a step
    float *lines;            // of an encoder: bias of each head by distance, [heads, lines_room]
    int64_t lines_room;
    const Step *step;
    const Sources *sources;
} Decoder;
