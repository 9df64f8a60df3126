// How attention deals its keys, and how their sums are added up: see attention.cuh.
#pragma once
#include "common.cuh"

#ifndef ATTENTION_WARPS
#error "ATTENTION_WARPS must be 1, 2, 4 or 8"
#endif
constexpr int CHUNK = 128;
__host__ __device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }
constexpr int VECTORS = (D + VECTOR - 1) / VECTOR;                   // 16-byte loads of a key
constexpr int KEY_LANES = power_of_two(VECTORS < 2 ? 2 : VECTORS);   // lanes that share a key
constexpr int GROUPS = 32 / KEY_LANES;                               // keys that a warp takes at once
constexpr int KEYS_A_PASS = 8 * GROUPS;                              // of eight shares
constexpr int PASSES = least(4, CHUNK / KEYS_A_PASS);              // keys of a lane in a share
constexpr int SHARES = CHUNK / (PASSES * GROUPS);                    // of a chunk: 8, or 16 or 32 where a key takes 16 or 32 lanes
constexpr int STREAMS = SHARES * GROUPS;                             // what groups of lanes sum by themselves
constexpr float HIDDEN = -3.0e38f;                                   // a score below all others
constexpr float LOG2E = 1.4426950408889634f;
static_assert(D % VECTOR == 0 && VECTORS <= 32, "d_kv");
static_assert(ATTENTION_WARPS <= 8 && 8 % ATTENTION_WARPS == 0, "ATTENTION_WARPS");

// What a chunk knows: the largest score, the sum of exponentials, the weighted sum of values [D].
constexpr int PART = D + 2;

// After the barrier every warp adds up its slices of the values of each lane.
constexpr int SLICE = least(4, ATTENTION_WARPS < VECTOR ? VECTOR / ATTENTION_WARPS : 1);
constexpr int SLICES = VECTOR / SLICE;
constexpr int SLICES_A_WARP = (SLICES + ATTENTION_WARPS - 1) / ATTENTION_WARPS;
struct alignas(SLICE * 4) Slice { float value[SLICE]; };

struct Sums { float largest, sum; };
struct SharedSums { Sums of[STREAMS]; Slice values[SHARES][SLICES][32]; };

__device__ __forceinline__ float exp2_fast(float x)
{
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// A warp's slices of the sums of all shares; all lanes of a slice's group of lanes have the same.
struct Merged { float largest, sum; Slice values[SLICES_A_WARP]; };

__device__ __forceinline__ Merged merge(const SharedSums& all, unsigned shares)
{
    constexpr int STREAMS_A_LANE = STREAMS / 32;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Merged merged = {HIDDEN, 0.f, {}};
    Sums sums[STREAMS_A_LANE];
#pragma unroll
    for (int i = 0; i < STREAMS_A_LANE; ++i) {
        sums[i] = SHARES == 8 || i * 32 + lane < shares * GROUPS ? all.of[i * 32 + lane] : Sums{HIDDEN, 0.f};
        merged.largest = fmaxf(merged.largest, sums[i].largest);
    }
#pragma unroll
    for (int step = 1; step < 32; step <<= 1)
        merged.largest = fmaxf(merged.largest, __shfl_xor_sync(0xffffffffu, merged.largest, step));
#pragma unroll
    for (int i = 0; i < STREAMS_A_LANE; ++i) {
        sums[i].largest = exp2_fast(sums[i].largest - merged.largest);  // how this stream counts
        merged.sum = fmaf(sums[i].largest, sums[i].sum, merged.sum);
    }
    merged.sum = sum_lanes(merged.sum, 1, 32);
#pragma unroll
    for (unsigned eight = 0; eight < SHARES; eight += 8) {
        if (eight && eight >= shares)
            break;
#pragma unroll
        for (unsigned i = eight; i < eight + 8; ++i) {
            const unsigned stream = i * GROUPS;
            const float factor = __shfl_sync(0xffffffffu, sums[stream / 32].largest, stream % 32 + lane / KEY_LANES);
#pragma unroll
            for (int s = 0; s < SLICES_A_WARP; ++s) {
                const Slice part = all.values[i][(warp + s * ATTENTION_WARPS) % SLICES][lane];
#pragma unroll
                for (int j = 0; j < SLICE; ++j)
                    merged.values[s].value[j] = fmaf(factor, part.value[j], merged.values[s].value[j]);
            }
        }
    }
#pragma unroll
    for (int s = 0; s < SLICES_A_WARP; ++s)
#pragma unroll
        for (int j = 0; j < SLICE; ++j)
            merged.values[s].value[j] = sum_lanes(merged.values[s].value[j], KEY_LANES, 32);
    return merged;
}

// A slice times a factor, stored by one instruction.
__device__ __forceinline__ void store(stored* to, const Slice& slice, float factor)
{
#if STORAGE == FLOAT32
    Slice result;
#pragma unroll
    for (int j = 0; j < SLICE; ++j)
        result.value[j] = slice.value[j] * factor;
    *(Slice*)to = result;
#else
    unsigned two[(SLICE + 1) / 2];
#pragma unroll
    for (int j = 0; j < SLICE; j += 2)
        two[j / 2] = narrow_two(slice.value[j] * factor, SLICE > 1 ? slice.value[(j + 1) % SLICE] * factor : 0.f);
    if (SLICE == 4)
        *(uint2*)to = {two[0], two[SLICE / 4]};
    else if (SLICE == 2)
        *(unsigned*)to = two[0];
    else
        *to = (stored)two[0];
#endif
}

// Count the CTAs of a row and head that have left their part; the last one adds up the parts [chunks][PART].
__device__ __forceinline__ void add_chunks(const float* parts, int chunks, stored* attended, int* arrived)
{
    __shared__ int is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(arrived, 1) == chunks - 1;
        if (is_last)
            *arrived = 0;
    }
    __syncthreads();
    if (!is_last)
        return;
    __threadfence();
    float most = HIDDEN;
    for (int c = 0; c < chunks; ++c)
        most = fmaxf(most, __ldcg(parts + c * PART));
    for (int i = threadIdx.x; i < D; i += ATTENTION_WARPS * 32) {
        float value = 0.f, weights = 0.f;
#pragma unroll 4
        for (int c = 0; c < chunks; ++c) {
            const float factor = exp2_fast(__ldcg(parts + c * PART) - most);
            weights = fmaf(__ldcg(parts + c * PART + 1), factor, weights);
            value = fmaf(__ldcg(parts + c * PART + 2 + i), factor, value);
        }
        attended[activation_index(blockIdx.y, blockIdx.x * D + i, HD_PAD)] = narrow(value / weights);
    }
}

// Store what a chunk gives: the result, or a part of it.
__device__ __forceinline__ void leave_result(const Merged& merged, int count, stored* attended, float* parts, int* arrived)
{
    const unsigned head = blockIdx.x, row = blockIdx.y, warp = threadIdx.x >> 5, part = threadIdx.x % KEY_LANES;
    const int chunks = (count + CHUNK - 1) / CHUNK;
    const float inverse = count ? __fdividef(1.f, merged.sum) : 0.f;
    float* of_row = parts + ((long long)row * H + head) * gridDim.z * PART;
    float* of_chunk = of_row + blockIdx.z * PART;
#pragma unroll
    for (int s = 0; s < SLICES_A_WARP; ++s) {
        const unsigned slice = warp + s * ATTENTION_WARPS, column = part * VECTOR + slice * SLICE;
        if (slice >= SLICES || (threadIdx.x & 31) >= VECTORS)
            continue;
        if (chunks <= 1)
            store(attended + activation_index(row, head * D + column, HD_PAD), merged.values[s], inverse);
        else
#pragma unroll
            for (int j = 0; j < SLICE; ++j)
                of_chunk[2 + column + j] = merged.values[s].value[j];
    }
    if (chunks <= 1)
        return;
    if (threadIdx.x == 0)
        of_chunk[0] = merged.largest, of_chunk[1] = merged.sum;
    add_chunks(of_row, chunks, attended, arrived + row * H + head);
}
