// What the products for many rows on GPUs with 227 KB of shared memory share: weights and rows on their way into shared memory, and the sums that
// threads leave in it.
//
// A CTA makes 16 * OUT_TILES outputs for 8 * OWN_ROW_TILES rows. Weights and rows come in steps of a few k tiles, all at once if they fit. Half of
// the warps, HALF_WARPS, has the first half of k, the others the second; each half copies and multiplies what is its own, and makes the parts of
// product.cuh one after the other.
#pragma once
#include "product.cuh"

// Shared memory that a CTA may take.
#ifndef TILED_SHARED
#define TILED_SHARED (208 * 1024)
#endif

// TOTAL: tiles of outputs in all.
template <int TOTAL, int OUT_TILES, int OWN_ROW_TILES, int K_TILES, int HALF_WARPS>
struct TiledCopies {
    static constexpr int TOTAL_TILES = TOTAL, TILES = OUT_TILES, TOGETHER = OUT_TILES, TURNS = 1, INPUTS = K_TILES, OWN_ROWS = OWN_ROW_TILES * 8;
    static constexpr int CLUSTER_CTAS = 1;
    static constexpr int HALF_THREADS = HALF_WARPS * 32, THREADS = HALVES * HALF_THREADS;
    static constexpr int PARTS = PRODUCT_WARPS / HALVES, PER_PART = (K_TILES + PRODUCT_WARPS - 1) / PRODUCT_WARPS;  // k tiles of a part
    static constexpr int MOST = INT8 ? 3 : 6, STEPS_A_PART = (PER_PART + MOST - 1) / MOST, STEPS = PARTS * STEPS_A_PART;
    static constexpr int STEP = (PER_PART + STEPS_A_PART - 1) / STEPS_A_PART;  // k tiles of each half that are copied together
    static constexpr bool EVEN = K_TILES % PRODUCT_WARPS == 0 && PER_PART % STEP == 0;  // no k tile is missing anywhere
    static constexpr int WEIGHT_BYTES = OUT_TILES * STEP * 512, HALF = WEIGHT_BYTES + OWN_ROW_TILES * STEP * BLOCK, SLOT = HALVES * HALF;
    static constexpr int DEPTH = least(STEPS, TILED_SHARED / SLOT);  // steps that shared memory holds
    static constexpr int LEAD = STEPS > DEPTH ? DEPTH - 1 : DEPTH;   // of which so many are on their way
    static constexpr int SUMS = OUT_TILES * OWN_ROWS * STRIDE;  // floats of a half
    static constexpr int SHARED = most(DEPTH * SLOT, HALVES * SUMS * 4);
    static constexpr int CTAS = SHARED <= 112 * 1024 ? 2 : 1;  // that an SM has shared memory for
    static_assert(SHARED <= TILED_SHARED && LEAD > 0, "tiles of a CTA");

    const uint4* matrix;
    int tile0, lane, half;

    // Start to copy weights; nothing that another kernel writes is read.
    __device__ __forceinline__ TiledCopies(const uint4* weights, int first_tile) : matrix(weights), tile0(first_tile)
    {
        lane = threadIdx.x & 31, half = threadIdx.x / HALF_THREADS;
#pragma unroll
        for (int step = 0; step < LEAD; ++step)
            copy_weights(step);
#pragma unroll
        for (int step = LEAD; step < STEPS; ++step)
            prefetch_weights(step);
    }

    __device__ __forceinline__ int part_of(int step) const { return half * PARTS + step / STEPS_A_PART; }
    // The first k tile of a step, counted from the half's first one; and in all.
    static __device__ __forceinline__ int in_half(int step) { return step / STEPS_A_PART * PER_PART + step % STEPS_A_PART * STEP; }
    __device__ __forceinline__ int first_of(int step) const { return half * (PARTS * PER_PART) + in_half(step); }
    __device__ __forceinline__ int count_of(int step) const
    {
        return EVEN ? STEP : min(STEP, min((part_of(step) + 1) * PER_PART, K_TILES) - first_of(step));  // below 1: none
    }
    __device__ __forceinline__ int place_of(int step) const { return step % DEPTH * SLOT + half * HALF; }

    __device__ __forceinline__ void copy_weights(int step)
    {
        unsigned to = (unsigned)__cvta_generic_to_shared(shared) + place_of(step);
        if constexpr (EVEN && HALF_WARPS % OUT_TILES == 0) {  // a warp has k tiles of one tile of outputs, constant distances apart
            constexpr int BESIDE = HALF_WARPS / OUT_TILES;
            const int warp = threadIdx.x / 32 % HALF_WARPS, tile = warp % OUT_TILES, beside = warp / OUT_TILES;
            const uint4* from = weights_at<K_TILES>(matrix, (tile_of<TOTAL, OUT_TILES>(tile0, tile)), half * (PARTS * PER_PART) + beside) + lane;
            to += ((tile * STEP + beside) * 32 + lane) * 16;
#pragma unroll
            for (int k = 0; k < STEP; k += BESIDE)
                if (STEP % BESIDE == 0 || k + beside < STEP)
                    copy_async(to + k * 512, from + (in_half(step) + k) * 32, true);
            return;
        }
        const int first = first_of(step), pieces = count_of(step) * 32;
#pragma unroll
        for (int i = threadIdx.x % HALF_THREADS; i < OUT_TILES * STEP * 32; i += HALF_THREADS) {
            const int piece = i % (STEP * 32);
            if (EVEN || piece < pieces)
                copy_async(to + i * 16, weights_at<K_TILES>(matrix, (tile_of<TOTAL, OUT_TILES>(tile0, i / (STEP * 32))), first) + piece, true);
        }
    }

    // Have weights of a later step come into the L2 cache.
    __device__ __forceinline__ void prefetch_weights(int step)
    {
        const int first = first_of(step), lines = count_of(step) * 4;
#pragma unroll
        for (int i = threadIdx.x % HALF_THREADS; i < OUT_TILES * STEP * 4; i += HALF_THREADS) {
            const int line = i % (STEP * 4);
            if (EVEN || line < lines)
                prefetch(weights_at<K_TILES>(matrix, (tile_of<TOTAL, OUT_TILES>(tile0, i / (STEP * 4))), first) + line * 8);
        }
    }

    __device__ __forceinline__ void copy_rows(int step, const void* x, int row0, int rows)
    {
        const unsigned to = (unsigned)__cvta_generic_to_shared(shared) + place_of(step) + WEIGHT_BYTES;
        if (EVEN)
            return copy_row_tiles<HALF_THREADS, OWN_ROW_TILES, STEP, K_TILES>(to, x, half * (PARTS * PER_PART), in_half(step), row0, rows,
                                                                              threadIdx.x % HALF_THREADS);
        const int first = first_of(step), pieces = count_of(step) * ROW_PIECES;
#pragma unroll
        for (int i = threadIdx.x % HALF_THREADS; i < OWN_ROW_TILES * STEP * ROW_PIECES; i += HALF_THREADS) {
            const int tile = (row0 >> 3) + i / (STEP * ROW_PIECES), piece = i % (STEP * ROW_PIECES);
            if (piece < pieces)
                copy_async(to + i * 16, (const uint4*)x + ((long long)tile * K_TILES + first) * ROW_PIECES + piece, tile * 8 < rows);
        }
    }

    // Start to copy the rows, each step's as a group of its own; the first one has all weights, too.
    __device__ __forceinline__ void begin(const void* x, int row0, int rows)
    {
#pragma unroll
        for (int step = 0; step < LEAD; ++step) {
            copy_rows(step, x, row0, rows);
            end_group();
        }
    }

    // Before the products of a step: its weights and rows are there, and those of a later step take the place of the step before.
    __device__ __forceinline__ void go_on(int step, const void* x, int row0, int rows)
    {
        __syncthreads();  // other threads have copied a part, and are done with the step before
        if (STEPS > DEPTH && step + LEAD < STEPS) {
            copy_weights(step + LEAD);
            copy_rows(step + LEAD, x, row0, rows);
        }
        end_group();  // an empty one, too: the wait counts groups
    }

    // Leave the sums of both halves for `total`, after a barrier; those of a warp are of some tiles of outputs and some tiles of rows.
    template <int WARP_TILES, int WARP_ROW_TILES>
    __device__ __forceinline__ void leave(const float (&sums)[WARP_TILES][WARP_ROW_TILES][4], int first_tile, int first_row_tile)
    {
        __syncthreads();  // weights and rows lie where the sums go
        float* own = (float*)shared + half * SUMS;
#pragma unroll
        for (int t = 0; t < WARP_TILES; ++t)
            store_sums<WARP_ROW_TILES * 4>(own + ((first_tile + t) * OWN_ROWS + first_row_tile * 8) * STRIDE, sums[t][0], lane);
    }
    __device__ __forceinline__ void end_turn(int) {}

    // Where the first half's sum of an output of a tile for a row lies, all counted from the first; the second half's is SUMS behind.
    static __device__ __forceinline__ const float* sum_of(int tile, int output, int row)
    {
        return (const float*)shared + tile * OWN_ROWS * STRIDE + sums_of_row(row) + output;
    }
};
