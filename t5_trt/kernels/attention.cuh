// Attention of one new token of every row over cached keys and values, by ordinary multiply-adds: float32, or a d_kv that tile_attention.cuh does not take.
//
// A CTA of ATTENTION_WARPS warps takes CHUNK keys of one head of one row; grid (H, rows, chunks). A multiprocessor must have room for
// ATTENTION_CTAS of them. Where a row has more keys, every CTA leaves its part, and the last one to finish adds the parts up in the order of
// the chunks. Chunks begin at fixed keys, so a result does not depend on how much room the cache has, nor on other rows.
//
// A share is SHARE neighbouring keys of a chunk. A group of lanes sums its keys of a share, relative to their
// largest score, and leaves that in shared memory; then the sums of all shares are added up in the order of the shares. A warp takes one
// share after the other, so a result does not depend on the number of warps either: few rows want many warps, for many rows each warp
// should do as much as it can.
#pragma once
#include "attention_sums.cuh"

// CTAs of attend_cross that an SM must have room for. It needs fewer registers than the others: without being asked, six or twelve fit, too.
#define CROSS_CTAS least(ATTENTION_CTAS, ATTENTION_WARPS == 8 ? 4 : 20 / ATTENTION_WARPS)

// How many shares `keys` keys of a chunk make; one if there are none.
__device__ __forceinline__ unsigned shares_of(int keys) { return (max(keys, 1) + SHARE - 1) / SHARE; }

// Where the keys and values of a row and head lie for one lane, and which keys count.
struct Place {
    const char *keys, *values;
    const float* bias;
    const unsigned char* beam_of;  // in MOVED
    int start, count, end, width;  // `start` to `end` is this chunk's part of `count` keys
    int group, of_bias;            // of this lane; how many keys into a share that key lies whose bias it loads
    unsigned row_bytes;
};

// What a lane holds of a share.
struct Share {
    int left;                            // keys of the chunk from the first one of the share on
    int own;                             // this lane's key of the first pass
    unsigned beam[PASSES];               // where they lie
    float bias;                          // of pass `part`, of those passes that there are
    uint4 key[PASSES], value[PASSES];    // zeros in place of keys that do not count
};

// For each pass of a share that has keys: call of(pass).
template <class Of>
__device__ __forceinline__ void each_pass(int left, Of of)
{
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
        if (!STRAIGHT && left <= i * GROUPS)
            break;
        of(i);
    }
}

// What is known of a share before its keys.
template <bool SELF, bool MOVED>
__device__ __forceinline__ void load_places(const Place& at, Share& held)
{
    if (MOVED) {
        const unsigned char* beam_of = at.beam_of + held.own;
        each_pass(held.left, [&](int i) {
            held.beam[i] = 0;
            if (at.group + i * GROUPS < held.left)
                held.beam[i] = beam_of[i * GROUPS];
        });
    }
    held.bias = 0.f;
    if (at.of_bias < held.left) {
        const int key = at.end - held.left + at.of_bias;
        held.bias = at.bias[SELF ? min(at.count - 1 - key, at.width - 1) : key];
    }
}

// A lane's vectors of a share's keys (or values), of the first `there` keys from the share's first one on.
template <bool MOVED>
__device__ __forceinline__ void load_vectors(const Place& at, const char* from, const Share& held, int there, uint4* vectors)
{
    const char* own = further(from, held.own, KEY_BYTES);
    there = threadIdx.x % KEY_LANES < VECTORS ? there - at.group : 0;
    each_pass(held.left, [&](int i) {
        vectors[i] = uint4{};
        const char* vector = (MOVED ? further(own, held.beam[i], at.row_bytes) : own) + i * (int)(GROUPS * KEY_BYTES);
        if (i * GROUPS < there)
            vectors[i] = __ldcg((const uint4*)vector);
    });
}

// The key and the value that the kernel before wrote, `newest` keys from the share's first one on.
template <bool MOVED>
__device__ __forceinline__ void load_newest(const Place& at, int newest, Share& held)
{
    if (newest < 0 || newest >= SHARE)  // another share's
        return;
    const char *keys = further(at.keys, held.own, KEY_BYTES), *values = further(at.values, held.own, KEY_BYTES);
    each_pass(held.left, [&](int i) {
        if (newest != at.group + i * GROUPS || threadIdx.x % KEY_LANES >= VECTORS)
            return;
        const auto load = [&](const char* own) {
            return __ldcg((const uint4*)((MOVED ? further(own, held.beam[i], at.row_bytes) : own) + i * (int)(GROUPS * KEY_BYTES)));
        };
        held.key[i] = load(keys), held.value[i] = load(values);
    });
}

// The scores of a share's keys, times LOG2E, where `q` has that factor. Returns the largest one of this lane's group.
__device__ __forceinline__ float score(const Place& at, const float* q, int left, float bias, const uint4* keys, float* scores)
{
    float largest = HIDDEN;
    bias *= LOG2E;
    each_pass(left, [&](int i) {
        float x[VECTOR], sum = threadIdx.x % KEY_LANES == i ? bias : 0.f;
        unpack(keys[i], x);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j)
            sum = fmaf(q[j], x[j], sum);
        sum = sum_lanes(sum, 1, KEY_LANES);
        scores[i] = at.group + i * GROUPS < left ? sum : -INFINITY;
        largest = fmaxf(largest, scores[i]);
    });
    return largest;
}

// The weighted sum of a share's values, left with what the weights are relative to.
__device__ __forceinline__ void leave_sums(unsigned share, int left, const uint4* values, const float* scores, float largest, SharedSums& all)
{
    const int lane = threadIdx.x & 31;
    float sum = 0.f, total[VECTOR] = {};
    each_pass(left, [&](int i) {
        const float weight = exp2_fast(scores[i] - largest);
        sum += weight;
        float x[VECTOR];
        unpack(values[i], x);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j)
            total[j] = fmaf(weight, x[j], total[j]);
    });
#pragma unroll
    for (int s = 0; s < SLICES; ++s) {
        Slice slice;
#pragma unroll
        for (int j = 0; j < SLICE; ++j)
            slice.value[j] = total[s * SLICE + j];
        all.values[share][s][lane] = slice;
    }
    if (lane % KEY_LANES == 0)
        all.of[share * GROUPS + lane / KEY_LANES] = {largest, sum};
}

// Every ATTENTION_WARPS-th of a chunk's shares, from share `warp` on; this lane's part of `queries` begins at `own_query`.
template <bool SELF, bool MOVED>
__device__ __forceinline__ void attend_shares(const Place& at, unsigned warp, unsigned shares, const float* queries, unsigned own_query, SharedSums& all)
{
    const int old = SELF ? at.count - 1 : at.count;  // keys that are there before the wait
    Share held;
    held.left = at.end - at.start - (int)warp * SHARE;
    held.own = at.start + warp * SHARE + at.group;
    load_places<SELF, MOVED>(at, held);
    const int there = held.left + min(old - at.end, 0);
    load_vectors<MOVED>(at, at.keys, held, there, held.key);
    load_vectors<MOVED>(at, at.values, held, there, held.value);
    let_next_start();
    wait_for_inputs();
    if (warp >= shares)
        return;
    float4 query[VECTOR / 4];
#pragma unroll
    for (int i = 0; i < VECTOR / 4; ++i)
        query[i] = threadIdx.x % KEY_LANES < VECTORS ? __ldcg((const float4*)(queries + own_query) + i) : float4{};
    if (SELF && old < at.end)
        load_newest<MOVED>(at, there, held);
    float q[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i += 4) {
        const float4 four = query[i / 4];
        q[i] = LOG2E * four.x, q[i + 1] = LOG2E * four.y, q[i + 2] = LOG2E * four.z, q[i + 3] = LOG2E * four.w;
    }
#pragma unroll 1
    for (unsigned share = warp; share < shares; share += ATTENTION_WARPS) {
        const unsigned next = share + ATTENTION_WARPS;
        const bool more = ATTENTION_WARPS < SHARES && next < shares;
        const int left = held.left;
        const float own_bias = held.bias;
        float scores[PASSES];
        if (more) {
            held.left -= ATTENTION_WARPS * SHARE, held.own += ATTENTION_WARPS * SHARE;
            load_places<SELF, MOVED>(at, held);
        }
        const float largest = score(at, q, left, own_bias, held.key, scores);
        if (more)
            load_vectors<MOVED>(at, at.keys, held, held.left, held.key);
        leave_sums(share, left, held.value, scores, largest, all);
        if (more)
            load_vectors<MOVED>(at, at.values, held, held.left, held.value);
        if (ATTENTION_WARPS >= SHARES)  // no loop, out of which the compiler would take what need not be done
            break;
    }
}

// MOVED: `ancestors` [rows][stride] says for each token of a row in which row of its `beams` neighbours the key and the value lie.
// SELF: keys up to and with the row's position, of which the last is written by the kernel before; the relative bias goes by the
// distance, bias [H][distances], the last entry serving all larger ones. Otherwise the keys of a source, which `beams` rows share, with
// bias [sources][width] (the additive mask) and lengths [sources].
//   query float32 [rows][HD_PAD]; keys, values [rows or sources][H][capacity][D]; attended as `activation_index` describes
//   parts float32 [rows][H][chunks][PART]; arrived int32 [rows][H], zeros before and after
template <bool SELF, bool MOVED>
__device__ __forceinline__ void attend(const float* query, const stored* keys, const stored* values, const float* bias,
                                       const int* lengths, const unsigned char* ancestors, stored* attended, float* parts, int* arrived,
                                       int capacity, int width, int beams, int stride, SharedSums& all)
{
    const unsigned head = blockIdx.x, row = blockIdx.y, part = threadIdx.x % KEY_LANES;
    const unsigned warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);  // the compiler does not know that a warp's lanes have the same
    const unsigned source = SELF ? row : row / (unsigned)beams;
    Place at;
    at.start = blockIdx.z * CHUNK;
    at.count = SELF ? lengths[row] + 1 : lengths[source];
    at.end = min(at.count, at.start + CHUNK);
    at.width = width;
    at.group = (threadIdx.x & 31) / KEY_LANES;
    at.of_bias = part < PASSES ? part * GROUPS + at.group : CHUNK;
    at.bias = bias + (SELF ? head : source) * (unsigned long long)(unsigned)width;
    at.beam_of = ancestors + row * (unsigned long long)(unsigned)stride;
    at.row_bytes = H * capacity * KEY_BYTES;
    const unsigned holder = MOVED ? row - row % (unsigned)beams : source;
    const unsigned lane_bytes = head * capacity * KEY_BYTES + part * 16;
    at.keys = further((const char*)keys + lane_bytes, holder, at.row_bytes);
    at.values = further((const char*)values + lane_bytes, holder, at.row_bytes);
    if (at.start >= at.count && at.start > 0)  // not the first chunk of a row that has no keys
        return let_next_start();
    // these through shuffles, so that the compiler does not put off what it takes to find them until after the wait
    const unsigned shares = __shfl_sync(0xffffffffu, shares_of(at.end - at.start), 0);
    const unsigned own_query = __shfl_sync(0xffffffffu, row * HD_PAD + head * D + part * VECTOR, threadIdx.x & 31);
    attend_shares<SELF, MOVED>(at, warp, shares, query, own_query, all);
    __syncthreads();
    leave_result(merge(all, shares), at.count, attended, parts, arrived);
}

extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, ATTENTION_CTAS)
attend_self(const float* query, const stored* keys, const stored* values, const float* bias, const int* position, stored* attended, float* parts,
            int* arrived, int capacity, int distances)
{
    __shared__ SharedSums all;
    attend<true, false>(query, keys, values, bias, position, nullptr, attended, parts, arrived, capacity, distances, 1, 0, all);
}

// A kernel of its own, as few rows are the slower the more code there is.
extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, ATTENTION_CTAS)
attend_moved(const float* query, const stored* keys, const stored* values, const float* bias, const int* position, stored* attended, float* parts,
             int* arrived, int capacity, int distances, const unsigned char* ancestors, int beams, int stride)
{
    __shared__ SharedSums all;
    attend<true, true>(query, keys, values, bias, position, ancestors, attended, parts, arrived, capacity, distances, beams, stride, all);
}

extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, CROSS_CTAS)
attend_cross(const float* query, const stored* keys, const stored* values, const float* mask, const int* lengths, stored* attended,
             float* parts, int* arrived, int capacity, int width, int beams)
{
    __shared__ SharedSums all;
    attend<false, false>(query, keys, values, mask, lengths, nullptr, attended, parts, arrived, capacity, width, beams, 0, all);
}
