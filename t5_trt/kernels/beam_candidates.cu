// The first half of a step of beam search: of every row and every SPAN of its scores the best CANDIDATES, in order, and what a softmax
// over the row needs. Grid (spans, rows); WARPS warps. `beam_step.cu` has the second half.
//
// Equal scores are taken in the order of their tokens, and the sums are added in a fixed order: a row depends on no other row.
//   scores float32 [rows][vocabulary]; found float32 and tokens int32 [rows][spans][CANDIDATES], -1 behind the last token there is;
//   hidden [vocabulary] or null: tokens that are -infinity as candidates, but count in the sums, while there are fewer than `until` tokens
//   statistics float32 [rows][spans][2]: the largest score of a span, and the sum of the exponentials of what the others are below it
#include "launch.cuh"

constexpr int WARP_SPAN = SPAN / WARPS, PER_LANE = WARP_SPAN / LANES;

// The best two keys of a lane that come behind a limit: a smaller key, or an equal one at a later place.
struct Two { unsigned best, second; int at, second_at; };

__device__ inline Two best_two(const unsigned (&keys)[PER_LANE], unsigned limit, int limit_at)
{
    Two found = {};
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const unsigned key = keys[i] < limit || (keys[i] == limit && i > limit_at) ? keys[i] : 0;
        if (key > found.best)
            found.second = found.best, found.second_at = found.at, found.best = key, found.at = i;
        else if (key > found.second)
            found.second = key, found.second_at = i;
    }
    return found;
}

// The best keys of a warp's lanes, PER_LANE each, go to lists in shared memory; the token of key i of a lane is first + i * LANES + lane.
// A lane looks through its keys again only when both of its best ones are taken, which is rare.
__device__ inline void best_of_warp(const unsigned (&keys)[PER_LANE], int first, int lane, unsigned* found, unsigned* tokens)
{
    Two own = best_two(keys, 0xffffffffu, -1);
    for (int rank = 0; rank < CANDIDATES; ++rank) {
        const unsigned top = lanes_max(own.best), token = first + own.at * LANES + lane, chosen = lowest_with(top, own.best, token);
        if (own.best == top && token == chosen) {
            found[rank] = top, tokens[rank] = token;
            const int at = own.at;
            own.best = own.second, own.at = own.second_at, own.second = 0;
            if (!own.best)
                own = best_two(keys, top, at);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * LANES)
beam_candidates(const float* scores, float* found, int* tokens, float* statistics, const unsigned char* hidden, const double* until,
                const long long* position, int vocabulary, int normalized)
{
    __shared__ unsigned keys_of[WARPS][CANDIDATES], tokens_of[WARPS][CANDIDATES];
    __shared__ float largest_of[WARPS], sum_of[WARPS];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int first = blockIdx.x * SPAN + warp * WARP_SPAN;
    const long long place = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    let_next_start();
    wait_for_inputs();
    const float* row = scores + (long long)blockIdx.y * vocabulary;
    unsigned keys[PER_LANE];
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int token = first + i * LANES + lane;
        keys[i] = token < vocabulary ? sortable(row[token]) : 0;
        largest = keys[i] > largest ? keys[i] : largest;
    }
    if (!normalized) {  // the sum of a warp, from its largest score
        const unsigned top = lanes_max(largest);
        const float most = top ? from_sortable(top) : 0.f;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (keys[i])
                sum += expf(from_sortable(keys[i]) - most);
        for (int step = 1; step < LANES; step <<= 1)
            sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0)
            largest_of[warp] = top ? most : -3.0e38f, sum_of[warp] = sum;
    }
    if (hidden && (double)(position[0] + 1) < until[0])
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (keys[i] && hidden[first + i * LANES + lane])
                keys[i] = sortable(-INFINITY);
    best_of_warp(keys, first, lane, keys_of[warp], tokens_of[warp]);
    __syncthreads();
    if (warp > 0)
        return;
    int heads[(WARPS + LANES - 1) / LANES] = {};
    for (int rank = 0; rank < CANDIDATES; ++rank) {
        unsigned own = 0, token = 0xffffffffu;
        int list = 0;
        for (int i = 0; i * LANES + lane < WARPS; ++i)  // lists in the order of their tokens: the first of equal ones stays
            if (heads[i] < CANDIDATES && keys_of[i * LANES + lane][heads[i]] > own)
                own = keys_of[i * LANES + lane][heads[i]], token = tokens_of[i * LANES + lane][heads[i]], list = i;
        const unsigned top = lanes_max(own), chosen = lowest_with(top, own, token);
        if (own == top && token == chosen) {
            found[place * CANDIDATES + rank] = from_sortable(top);
            tokens[place * CANDIDATES + rank] = top ? (int)token : -1;
            ++heads[list];
        }
    }
    if (!normalized && lane == 0) {
        float most = largest_of[0], sum = 0.f;
        for (int i = 1; i < WARPS; ++i)
            most = largest_of[i] > most ? largest_of[i] : most;
        for (int i = 0; i < WARPS; ++i)
            sum += sum_of[i] * expf(largest_of[i] - most);
        statistics[place * 2] = most, statistics[place * 2 + 1] = sum;
    }
}
