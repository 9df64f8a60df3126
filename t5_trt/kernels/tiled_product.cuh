// Products for many rows by tensor cores of single warps: the sums of product.cuh, bit for bit, with fewer reads of weights and rows out of the L2
// cache, which is what limits those at 64 rows and more. The warps of a half share outputs and rows, each WARP_TILES by 4 tiles.
#pragma once
#include "tiled_copies.cuh"

template <int TOTAL, int OUT_TILES, int K_TILES>
struct TiledProduct : TiledCopies<TOTAL, OUT_TILES, 8, K_TILES, OUT_TILES / (OUT_TILES >= 4 ? 2 : 1) * 2> {
    static constexpr bool IS_NORMED = true;
    static constexpr int WIDTH = 1;
    static constexpr int WARP_TILES = OUT_TILES >= 4 ? 2 : 1, WARP_ROW_TILES = 4, ROW_WARPS = 8 / WARP_ROW_TILES, HALF_WARPS = OUT_TILES / WARP_TILES * ROW_WARPS;
    typedef TiledCopies<TOTAL, OUT_TILES, 8, K_TILES, HALF_WARPS> Copies;
    using Copies::STEP, Copies::STEPS, Copies::STEPS_A_PART, Copies::LEAD, Copies::EVEN, Copies::WEIGHT_BYTES, Copies::lane;
    static_assert(OUT_TILES % WARP_TILES == 0, "tiles of a CTA");

    float sums[WARP_TILES][WARP_ROW_TILES][4] = {}, part[WARP_TILES][WARP_ROW_TILES][4] = {};
    int warp_tile, warp_row_tile;

    __device__ __forceinline__ TiledProduct(const uint4* weights, int first_tile) : Copies(weights, first_tile)
    {
        const int warp = (threadIdx.x >> 5) % HALF_WARPS;
        warp_tile = warp / ROW_WARPS * WARP_TILES, warp_row_tile = warp % ROW_WARPS * WARP_ROW_TILES;
    }

    // Multiply, and leave the sums for `total`; a barrier must follow.
    __device__ __forceinline__ void run(int, const void* x, int row0, int rows)
    {
#pragma unroll 1
        for (int step = 0; step < STEPS; ++step) {
            wait_for_group<LEAD - 1>();
            this->go_on(step, x, row0, rows);
            multiply(step);
            if (step % STEPS_A_PART == STEPS_A_PART - 1)
                end_part();
        }
        this->leave(sums, warp_tile, warp_row_tile);
    }

    __device__ __forceinline__ void multiply(int step)
    {
        const char* at = shared + this->place_of(step);
        const uint4* weights = (const uint4*)at + warp_tile * STEP * 32 + lane;
        const Rows* x = (const Rows*)(at + WEIGHT_BYTES) + warp_row_tile * STEP * 32 + lane;
        const int count = Copies::count_of(step);
#pragma unroll
        for (int k = 0; k < STEP; ++k) {
            if (!EVEN && k >= count)
                break;
            Factor a[WARP_TILES];
#pragma unroll
            for (int t = 0; t < WARP_TILES; ++t)
                a[t] = Factor(weights[(t * STEP + k) * 32]);
#pragma unroll
            for (int r = 0; r < WARP_ROW_TILES; ++r) {
                const Rows b = x[(r * STEP + k) * 32];
#pragma unroll
                for (int t = 0; t < WARP_TILES; ++t)
                    multiply_tiles(part[t][r], a[t], b);
            }
        }
    }

    // Add what a warp of product.cuh would have made.
    __device__ __forceinline__ void end_part()
    {
#pragma unroll
        for (int t = 0; t < WARP_TILES; ++t)
#pragma unroll
            for (int r = 0; r < WARP_ROW_TILES; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[t][r][i] += part[t][r][i];
                    part[t][r][i] = 0.f;
                }
    }

    // One output of a tile for one row, both counted from the first.
    static __device__ __forceinline__ float total(int, int tile, int output, int row)
    {
        const float* first = Copies::sum_of(tile, output, row);
        return first[0] + first[Copies::SUMS];
    }
};
