// What the tokens that a row has do to its scores: a repetition penalty, no n-gram twice, no end before a least length, in this order.
//
// One CTA for a row. Results are those of Transformers' RepetitionPenaltyLogitsProcessor, NoRepeatNGramLogitsProcessor, MinLengthLogitsProcessor and
// MinNewTokensLengthLogitsProcessor, bit for bit.
//   scores float32 [.][vocabulary]; tokens int64 [.][capacity]; ends int64 [rows or 1][count], below 0 where there are fewer; position int64 [1]
#include "token_rules.cuh"

// Whether `token` is one of the vocabulary's.
__device__ inline bool known(long long token, int vocabulary) { return token >= 0 && token < vocabulary; }

__device__ inline bool occurs(const long long* tokens, int count, long long token)
{
    for (int i = 0; i < count; ++i)
        if (tokens[i] == token)
            return true;
    return false;
}

// Each token once: a round of threads reads before it writes, and leaves out what an earlier round has had.
__device__ inline void penalize(float* scores, const Rules& rules, const long long* tokens, int length, int vocabulary)
{
    const float penalty = (float)rules.penalty, divisor = (float)rules.divisor;
    for (int first = 0; first < length; first += blockDim.x) {
        const int i = first + threadIdx.x;
        const long long token = i < length ? tokens[i] : -1;
        const bool own = known(token, vocabulary) && !occurs(tokens, first, token);
        const float score = own ? scores[token] : 0.f;
        __syncthreads();
        if (own)
            scores[token] = score < 0.f ? score * penalty : divided(score, divisor);
    }
    __syncthreads();
}

// Hide the tokens that would end an n-gram the row has.
__device__ inline void ban_repeats(float* scores, int size, const long long* tokens, int length, int vocabulary)
{
    const long long* prefix = tokens + length - (size - 1);
    for (int start = threadIdx.x; start + size <= length; start += blockDim.x) {
        bool same = true;
        for (int i = 0; i < size - 1; ++i)
            same &= tokens[start + i] == prefix[i];
        const long long last = tokens[start + size - 1];
        if (same && known(last, vocabulary))
            scores[last] = -INFINITY;
    }
}

extern "C" __global__ void edit_scores(
    float* scores, const Rules* rules, long long* tokens, const long long* ends, const long long* position, int by_row, int capacity, int count,
    int vocabulary)
{
    let_next_start();
    wait_for_inputs();
    const Rules& own = own_rules(rules, by_row);
    const int length = (int)(own.length < 0 ? position[0] + 1 : own.length);
    long long* row = tokens + (own.slot < 0 ? blockIdx.x : own.slot) * capacity;
    scores += place_of(own) * vocabulary;
    if (length == 1 && own.first >= 0) {
        if (threadIdx.x == 0)
            row[0] = own.first;
        __syncthreads();
    }
    if (own.penalty != 1.)
        penalize(scores, own, row, length, vocabulary);
    if (own.ngram > 0)
        ban_repeats(scores, (int)own.ngram, row, length, vocabulary);
    if (length < own.until)
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            const long long end = ends[(by_row ? (long long)blockIdx.x * count : 0) + i];
            if (known(end, vocabulary))
                scores[end] = -INFINITY;
        }
}
