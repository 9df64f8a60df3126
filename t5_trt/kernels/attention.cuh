// Attention of one new token of every row over cached keys and values.
//
// A CTA takes CHUNK keys of one head of one row; grid (H, rows, chunks). Where a row has more keys, every CTA leaves its part, and the
// last one to finish adds the parts up in the order of the chunks. Chunks begin at fixed keys, so a result does not depend on how much
// room the cache has, nor on other rows.
#pragma once
#include "common.cuh"

constexpr int ATTENTION_WARPS = 8;
// CTAs that an SM must have room for: as many as registers allow without spilling.
#define ATTENTION_CTAS (__CUDA_ARCH__ >= 900 ? 4 : 3)
constexpr int CHUNK = 128;
__host__ __device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }
constexpr int VECTORS = (D + VECTOR - 1) / VECTOR;      // 16-byte loads of a key
constexpr int KEY_LANES = power_of_two(VECTORS);        // lanes that share a key
constexpr int KEYS_A_PASS = ATTENTION_WARPS * (32 / KEY_LANES);
constexpr int PASSES = CHUNK / KEYS_A_PASS;
constexpr int AHEAD = PASSES < 4 ? PASSES : 4;          // passes whose keys and values are loaded before the wait
constexpr float HIDDEN = -3.0e38f;                      // a score below all others
static_assert(D % VECTOR == 0 && VECTORS <= 32, "d_kv");

// What a chunk knows: the largest score, the sum of exponentials, the weighted sum of values [D].
constexpr int PART = D + 2;

// Attention of one warp of a chunk over its keys: every pass takes 32 / KEY_LANES of them. The warp leaves its largest score, its sum of
// exponentials and its weighted sum of values [D] in shared memory. `key_of(pass)` and `value_of(pass)` give what this lane has of a key.
struct WarpPart { float largest, sum, values[D]; };

template <class KeyOf, class ValueOf, class BiasOf>
__device__ __forceinline__ void attend_warp(const float* q, int share, int start, int end, KeyOf key_of, ValueOf value_of, BiasOf bias_of,
                                            WarpPart& result)
{
    const int lane = threadIdx.x & 31, group = lane / KEY_LANES, part = lane % KEY_LANES;
    const bool mine = part < VECTORS;
    float scores[PASSES], largest = HIDDEN, sum = 0.f, total[VECTOR] = {};
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
        scores[i] = HIDDEN;
        if (start + i * KEYS_A_PASS >= end)
            continue;
        const int key = start + i * KEYS_A_PASS + share * (32 / KEY_LANES) + group;
        float score = 0.f;
        if (key < end && mine) {
            float x[VECTOR];
            unpack(key_of(i, key), x);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j)
                score = fmaf(q[j], x[j], score);
            if (part == 0)
                score += bias_of(i, key);
        }
        score = sum_lanes(score, 1, KEY_LANES);
        if (key < end)
            scores[i] = score;
        largest = fmaxf(largest, scores[i]);
    }
#pragma unroll
    for (int step = KEY_LANES; step < 32; step <<= 1)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
        const int key = start + i * KEYS_A_PASS + share * (32 / KEY_LANES) + group;
        if (key < end && mine) {
            const float weight = __expf(scores[i] - largest);
            sum += weight;
            float x[VECTOR];
            unpack(value_of(i, key), x);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j)
                total[j] = fmaf(weight, x[j], total[j]);
        }
    }
    sum = sum_lanes(sum, KEY_LANES, 32);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        total[j] = sum_lanes(total[j], KEY_LANES, 32);
        if (group == 0 && mine)
            result.values[part * VECTOR + j] = total[j];
    }
    if (lane == 0)
        result.largest = largest, result.sum = sum;
}

// The parts of a chunk's warps added up in their order: the largest score, the sum, and how each warp's part counts.
struct Merged { float largest, sum, scale[ATTENTION_WARPS]; };

__device__ __forceinline__ Merged merge(const WarpPart* parts)
{
    Merged all;
    all.largest = HIDDEN, all.sum = 0.f;
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; ++w)
        all.largest = fmaxf(all.largest, parts[w].largest);
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; ++w) {
        all.scale[w] = __expf(parts[w].largest - all.largest);
        all.sum = fmaf(all.scale[w], parts[w].sum, all.sum);
    }
    return all;
}

__device__ __forceinline__ float merged_value(const WarpPart* parts, const Merged& all, int i)
{
    float value = 0.f;
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; ++w)
        value = fmaf(all.scale[w], parts[w].values[i], value);
    return value;
}

struct Chunk { uint4 key[AHEAD], value[AHEAD]; float bias[AHEAD]; };

// `ancestors` [rows][stride] (or null) says for each token of a row in which row of its `beams` neighbours the key and the value lie.
// SELF: keys up to and with the row's position, of which the last is written by the kernel before; the relative bias goes by the
// distance, bias [H][distances], the last entry serving all larger ones. Otherwise the keys of a source, which `beams` rows share, with
// bias [sources][width] (the additive mask) and lengths [sources].
//   query float32 [rows][HD_PAD]; keys, values [rows or sources][H][capacity][D]; attended as `activation_index` describes
//   parts float32 [rows][H][chunks][PART]; arrived int32 [rows][H], zeros before and after
template <bool SELF>
__device__ __forceinline__ void attend(const float* query, const stored* keys, const stored* values, const float* bias,
                                       const int* lengths, const unsigned char* ancestors, stored* attended, float* parts, int* arrived,
                                       int capacity, int width, int beams, int stride)
{
    __shared__ WarpPart warp_parts[ATTENTION_WARPS];
    __shared__ int is_last;
    const int head = blockIdx.x, row = blockIdx.y, start = blockIdx.z * CHUNK;
    const int source = SELF ? row : row / beams;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = lane / KEY_LANES, part = lane % KEY_LANES;
    const int count = SELF ? lengths[row] + 1 : lengths[source];     // keys in all
    const int old = SELF ? count - 1 : count;                        // that are there before the wait
    const int end = min(count, start + CHUNK);
    const bool mine = part < VECTORS;
    const bool moved = SELF && ancestors;
    const unsigned char* beam_of = ancestors + (long long)row * stride;
    const long long row_size = (long long)H * capacity * D;
    const long long at = (moved ? row / beams * beams : source) * row_size + (long long)head * capacity * D + part * VECTOR;
    const stored *k = keys + at, *v = values + at;
    const auto offset = [&](int key) { return key * (long long)D + (moved ? beam_of[key] * row_size : 0); };
    const auto place = [&](int pass) { return start + pass * KEYS_A_PASS + warp * (32 / KEY_LANES) + group; };
    const auto bias_of = [&](int key) {
        return SELF ? bias[(long long)head * width + min(count - 1 - key, width - 1)] : bias[(long long)source * width + key];
    };
    if (start >= count && start > 0)  // not the first chunk of a row that has no keys
        return let_next_start();
    Chunk ahead;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        const int key = place(i);
        ahead.bias[i] = key < end && part == 0 ? bias_of(key) : 0.f;
        if (key < min(old, end) && mine) {
            const long long there = offset(key);
            ahead.key[i] = __ldcg((const uint4*)(k + there));
            ahead.value[i] = __ldcg((const uint4*)(v + there));
        }
    }
    let_next_start();
    wait_for_inputs();
    float q[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i += 4) {
        const float4 four = mine ? __ldcg((const float4*)(query + (long long)row * HD_PAD + head * D + part * VECTOR + i)) : float4{};
        q[i] = four.x, q[i + 1] = four.y, q[i + 2] = four.z, q[i + 3] = four.w;
    }
    if (SELF)
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (place(i) == old && old < end && mine) {
                const long long there = offset(old);
                ahead.key[i] = __ldcg((const uint4*)(k + there));
                ahead.value[i] = __ldcg((const uint4*)(v + there));
            }
    const auto loaded = [&](const uint4* held, int pass, int key, const stored* from) {
        return pass < AHEAD ? held[pass < AHEAD ? pass : 0] : __ldcg((const uint4*)(from + offset(key)));
    };
    attend_warp(q, warp, start, end, [&](int pass, int key) { return loaded(ahead.key, pass, key, k); },
                [&](int pass, int key) { return loaded(ahead.value, pass, key, v); },
                [&](int pass, int key) { return pass < AHEAD ? ahead.bias[pass < AHEAD ? pass : 0] : bias_of(key); }, warp_parts[warp]);
    __syncthreads();
    const Merged all_warps = merge(warp_parts);
    const int chunks = (count + CHUNK - 1) / CHUNK;
    if (chunks <= 1) {
        for (int i = threadIdx.x; i < D; i += ATTENTION_WARPS * 32) {
            const float value = merged_value(warp_parts, all_warps, i);
            attended[activation_index(row, head * D + i, HD_PAD)] = narrow(count ? value / all_warps.sum : 0.f);
        }
        return;
    }
    float* all = parts + ((long long)row * H + head) * gridDim.z * PART;
    float* mine_of_all = all + blockIdx.z * PART;
    for (int i = threadIdx.x; i < D; i += ATTENTION_WARPS * 32) {
        mine_of_all[2 + i] = merged_value(warp_parts, all_warps, i);
    }
    if (threadIdx.x == 0)
        mine_of_all[0] = all_warps.largest, mine_of_all[1] = all_warps.sum;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(arrived + row * H + head, 1) == chunks - 1;
        if (is_last)
            arrived[row * H + head] = 0;
    }
    __syncthreads();
    if (!is_last)
        return;
    __threadfence();
    float most = HIDDEN;
    for (int c = 0; c < chunks; ++c)
        most = fmaxf(most, __ldcg(all + c * PART));
    for (int i = threadIdx.x; i < D; i += ATTENTION_WARPS * 32) {
        float value = 0.f, weights = 0.f;
        for (int c = 0; c < chunks; ++c) {
            const float factor = __expf(__ldcg(all + c * PART) - most);
            weights = fmaf(__ldcg(all + c * PART + 1), factor, weights);
            value = fmaf(__ldcg(all + c * PART + 2 + i), factor, value);
        }
        attended[activation_index(row, head * D + i, HD_PAD)] = narrow(value / weights);
    }
}

extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, ATTENTION_CTAS)
attend_self(const float* query, const stored* keys, const stored* values, const float* bias, const int* position,
            const unsigned char* ancestors, stored* attended, float* parts, int* arrived, int capacity, int distances, int beams, int stride)
{
    attend<true>(query, keys, values, bias, position, ancestors, attended, parts, arrived, capacity, distances, beams, stride);
}

extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, ATTENTION_CTAS)
attend_cross(const float* query, const stored* keys, const stored* values, const float* mask, const int* lengths, stored* attended,
             float* parts, int* arrived, int capacity, int width, int beams)
{
    attend<false>(query, keys, values, mask, lengths, nullptr, attended, parts, arrived, capacity, width, beams, 0);
}
