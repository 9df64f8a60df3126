// Weights and rows of products: where they lie, and how they come into registers and shared memory.
//
// Weights are stored tile by tile: [out tile][k tile][lane], 16 bytes a lane in the order of mma.m16n8k16's A fragments (float32: two times 16 bytes;
// lane l has row l % 16 and 8 columns from l / 16 * 8; 8 bits: int8_weights.cuh). A k tile is 16 columns, of 8-bit weights 32. Rows are what
// `activation_index` describes.
#pragma once
#include "int8_weights.cuh"

#if STORAGE == FLOAT32
struct Weights { uint4 low, high; };
#else
typedef uint4 Weights;
#endif
#if INT8
typedef uint4 Rows;  // a lane's B fragments of 8 rows and a k tile
#else
typedef uint2 Rows;
#endif
constexpr int WEIGHT_PIECES = STORAGE == FLOAT32 ? 64 : 32;  // of 16 bytes, of a tile of outputs and a k tile
constexpr int BLOCK = 8 * K_TILE * 2, ROW_PIECES = BLOCK / 16;  // bytes of 8 rows and a k tile in half precision, and pieces of 16

#if STORAGE != FLOAT32
// A lane's B fragments of 8 rows and a k tile in shared memory.
__device__ __forceinline__ Rows lane_rows(const char* block, int lane)
{
#if WARPGROUPS
    return {((const unsigned*)block)[lane], ((const unsigned*)block)[32 + lane]};
#else
    return ((const Rows*)block)[lane];
#endif
}
#endif

// The lane whose B fragments of 8 rows a lane reads: its own, or, of a row beyond the last one, that of the last row, so that fewer bytes come.
// Nobody looks at what it makes of them.
__device__ __forceinline__ int lane_of_rows(int lane, int rows) { return min(lane >> 2, rows - 1) * 4 + (lane & 3); }

// The same address. The compiler then counts from it, with distances in the instructions, instead of making each address anew.
__device__ __forceinline__ const uint4* count_from(const uint4* address)
{
    asm volatile("" : "+l"(address));
    return address;
}

#if STORAGE != FLOAT32
// Start to copy STEP k tiles, from `first` + `more` on (`more` is a constant), of COUNT row tiles, from `row0` on, into shared memory:
// [row tile][k tile]. By THREADS threads, of which this is number `thread`. k tiles from K_TILES on are not copied, and rows from `rows` on are zeros.
// Neighbouring threads have the pieces of a row tile and a k tile, so that all of a thread's copies lie constant distances apart: otherwise it takes
// many more instructions to find their addresses than to copy.
template <int THREADS, int COUNT, int STEP, int K_TILES>
__device__ __forceinline__ void copy_row_tiles(unsigned to, const void* x, int first, int more, int row0, int rows, int thread)
{
    constexpr int AT_ONCE = THREADS / ROW_PIECES, TILES_AT_ONCE = least(AT_ONCE, COUNT), BESIDE = AT_ONCE / TILES_AT_ONCE;
    const int own = thread / ROW_PIECES, tile = own % TILES_AT_ONCE, beside = own / TILES_AT_ONCE, piece = thread % ROW_PIECES;
    const uint4* from = (const uint4*)x + (((row0 >> 3) + tile) * (K_TILES * ROW_PIECES) + (first + beside) * ROW_PIECES + piece);
    from = count_from(from) + more * ROW_PIECES;
    to += ((tile * STEP + beside) * ROW_PIECES + piece) * 16;
#pragma unroll
    for (int t = 0; t < COUNT; t += TILES_AT_ONCE)
#pragma unroll
        for (int k = 0; k < STEP; k += BESIDE)
            if ((AT_ONCE % TILES_AT_ONCE == 0 || beside < BESIDE) && (COUNT % TILES_AT_ONCE == 0 || tile + t < COUNT) &&
                (STEP % BESIDE == 0 || k + beside < STEP) && (K_TILES % STEP == 0 || first + more + k + beside < K_TILES))
                copy_async(to + (t * STEP + k) * BLOCK, from + (t * K_TILES + k) * ROW_PIECES, row0 + (tile + t) * 8 < rows);
}
#endif

// Where the weights of a tile of outputs and a k tile begin.
template <int K_TILES> constexpr int TILE_PIECES = K_TILES * WEIGHT_PIECES + SCALE_PIECES;  // of 16 bytes, of a tile of outputs
template <int K_TILES> __device__ __forceinline__ const uint4* weights_at(const uint4* matrix, int tile, int k_tile)
{
    return matrix + (long long)tile * TILE_PIECES<K_TILES> + k_tile * WEIGHT_PIECES;
}

// The number of a tile of outputs of a CTA whose first one is `tile0`; the last of TOTAL in place of tiles beyond it.
template <int TOTAL, int OUT_TILES> __device__ __forceinline__ int tile_of(int tile0, int tile)
{
    return TOTAL % OUT_TILES ? min(tile0 + tile, TOTAL - 1) : tile0 + tile;
}

// What lies as far behind `own`, which belongs to tile `tile0`, as that tile's `tile`-th neighbour.
template <int TOTAL, int OUT_TILES, int K_TILES> __device__ __forceinline__ const uint4* of_tile(const uint4* own, int tile0, int tile)
{
    if (TOTAL % OUT_TILES == 0)
        return own + tile * TILE_PIECES<K_TILES>;
    return own + (tile_of<TOTAL, OUT_TILES>(tile0, tile) - tile0) * (long long)TILE_PIECES<K_TILES>;
}

// A lane's weights of a k tile; `early` if a wait follows, for which the compiler must not delay the load.
__device__ __forceinline__ Weights load_weights(const uint4* from, bool early)
{
    const auto load = [&](int i) { return early ? load_before_wait(from + i) : load_streaming(from + i); };
#if STORAGE == FLOAT32
    return {load(0), load(32)};
#else
    return load(0);
#endif
}

// Have weights come into the L2 cache.
__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Start to copy the scales of a CTA's outputs into shared memory; they are there after a wait for all groups and a barrier.
template <class P> __device__ __forceinline__ void copy_scales(const uint4* matrix, int tile0, float* to)
{
#if INT8
    const int tile = threadIdx.x >> 2, piece = threadIdx.x & 3;
    if (tile < P::TILES)
        copy_async((unsigned)__cvta_generic_to_shared(to + threadIdx.x * 4),
                   weights_at<P::INPUTS>(matrix, (tile_of<P::TOTAL_TILES, P::TILES>(tile0, tile)), P::INPUTS) + piece, true);
    end_group();
#endif
}
