// How attention shares its keys out, and how their sums are added up: see attention.cuh.
#pragma once
#include "attention_chunks.cuh"

#ifndef ATTENTION_WARPS
#error "ATTENTION_WARPS must be 1, 2, 4 or 8, and ATTENTION_CTAS a number of CTAs"
#endif
__host__ __device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }
constexpr int VECTORS = (D + VECTOR - 1) / VECTOR;                   // 16-byte loads of a key
constexpr int KEY_LANES = power_of_two(VECTORS < 2 ? 2 : VECTORS);   // lanes that share a key
constexpr int GROUPS = 32 / KEY_LANES;                               // keys that a warp takes at once
constexpr int PASSES = least(4, CHUNK / (8 * GROUPS));               // keys of a lane in a share: a chunk has eight or more
constexpr int SHARE = PASSES * GROUPS;                               // keys of a share
constexpr int SHARES = CHUNK / SHARE;                                // of a chunk: 8, or 16 or 32 where a key takes 16 or 32 lanes
constexpr int STREAMS = SHARES * GROUPS;                             // what groups of lanes sum by themselves
static_assert(D % VECTOR == 0 && VECTORS <= 32, "d_kv");
static_assert(ATTENTION_WARPS <= 8 && 8 % ATTENTION_WARPS == 0, "ATTENTION_WARPS");

// After the barrier every warp adds up its slices of the values of each lane.
constexpr int SLICE = least(4, ATTENTION_WARPS < VECTOR ? VECTOR / ATTENTION_WARPS : 1);
constexpr int SLICES = VECTOR / SLICE;
constexpr int SLICES_A_WARP = (SLICES + ATTENTION_WARPS - 1) / ATTENTION_WARPS;
struct alignas(SLICE * 4) Slice { float value[SLICE]; };

struct Sums { float largest, sum; };
struct SharedSums { Sums of[STREAMS]; Slice values[SHARES][SLICES][32]; };

// Whether passes and shares without keys are made, too, so that no branch keeps them from running side by side: where there are few rows.
constexpr bool STRAIGHT = ATTENTION_WARPS == 8;

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
        sums[i] = i * 32 + lane < shares * GROUPS ? all.of[i * 32 + lane] : Sums{HIDDEN, 0.f};
        merged.largest = fmaxf(merged.largest, sums[i].largest);
    }
    merged.largest = from_sortable(lanes_max(sortable(merged.largest)));
#pragma unroll
    for (int i = 0; i < STREAMS_A_LANE; ++i) {
        sums[i].largest = exp2_fast(sums[i].largest - merged.largest);  // how this stream counts
        merged.sum = fmaf(sums[i].largest, sums[i].sum, merged.sum);
    }
#pragma unroll
    for (unsigned i = 0; i < SHARES; ++i) {
        if (!STRAIGHT && i >= shares)
            break;
        const unsigned stream = i * GROUPS;
        const float factor = __shfl_sync(0xffffffffu, sums[stream / 32].largest, stream % 32 + lane / KEY_LANES);
#pragma unroll
        for (int s = 0; s < SLICES_A_WARP; ++s) {
            const Slice part = all.values[i][(warp + s * ATTENTION_WARPS) % SLICES][lane];
#pragma unroll
            for (int j = 0; j < SLICE; ++j)
                merged.values[s].value[j] = fmaf(factor, i < shares ? part.value[j] : 0.f, merged.values[s].value[j]);
        }
    }
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {  // sums over lanes, side by side
        merged.sum += __shfl_xor_sync(0xffffffffu, merged.sum, step);
        if (step < KEY_LANES)
            continue;
#pragma unroll
        for (int s = 0; s < SLICES_A_WARP; ++s)
#pragma unroll
            for (int j = 0; j < SLICE; ++j)
                merged.values[s].value[j] += __shfl_xor_sync(0xffffffffu, merged.values[s].value[j], step);
    }
    return merged;
}

// A slice times a factor, stored by one instruction, or two.
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
    if (SLICE == 4 && WARPGROUPS)
        ((unsigned*)to)[0] = two[0], ((unsigned*)to)[32] = two[SLICE / 4];  // the other half of the columns lies 128 bytes behind
    else if (SLICE == 4)
        *(uint2*)to = {two[0], two[SLICE / 4]};
    else if (SLICE == 2)
        *(unsigned*)to = two[0];
    else
        *to = (stored)two[0];
#endif
}

// Store what a chunk gives: the result, or a part of it.
__device__ __forceinline__ void leave_result(const Merged& merged, int count, stored* attended, float* parts, int* arrived)
{
    const unsigned head = blockIdx.x, row = blockIdx.y, warp = threadIdx.x >> 5, part = threadIdx.x % KEY_LANES;
    const int chunks = (count + CHUNK - 1) / CHUNK;
    const float inverse = count ? __fdividef(1.f, merged.sum) : 0.f;
    float* of_chunk = parts_of(parts, row) + blockIdx.z * PART;
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
    add_chunks<ATTENTION_WARPS * 32>(parts, chunks, row, 1, attended, arrived);
}
