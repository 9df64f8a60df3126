// Products for many rows by warp groups (warpgroup.cuh): the sums of product.cuh, bit for bit. Each half of the warps is a group, whose warps have a
// tile of outputs each.
#pragma once
#include "tiled_copies.cuh"
#include "warpgroup.cuh"

#if WARPGROUPS
template <int TOTAL, int K_TILES>
struct GroupProduct : TiledCopies<TOTAL, 4, WARPGROUPS, K_TILES, 4> {
    static constexpr bool IS_NORMED = true;
    static constexpr int WIDTH = 4;  // outputs that a thread hands over
    typedef TiledCopies<TOTAL, 4, WARPGROUPS, K_TILES, 4> Copies;
    using Copies::STEP, Copies::STEPS, Copies::STEPS_A_PART, Copies::DEPTH, Copies::LEAD, Copies::WEIGHT_BYTES, Copies::OWN_ROWS, Copies::lane;
    static_assert(Copies::EVEN, "a warp group multiplies whole steps");
    static constexpr int MADE = OWN_ROWS / 2;  // of a lane: an accumulator of mma for every row tile

    float sums[1][WARPGROUPS][4] = {}, made[2][MADE];  // of parts: one is under way while the one before is added

    __device__ __forceinline__ GroupProduct(const uint4* weights, int first_tile) : Copies(weights, first_tile) {}

    // Multiply, and leave the sums for `total`; a barrier must follow.
    __device__ __forceinline__ void run(int, const void* x, int row0, int rows)
    {
        const int warp = (threadIdx.x >> 5) % 4;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int part = step / STEPS_A_PART;
            wait_for_group<LEAD - 1>();
            show_to_products();
            if (STEPS > DEPTH && step > 0)  // the step before is read until its products are made
                wait_for_products<0, MADE>(made[(step - 1) / STEPS_A_PART & 1]);
            this->go_on(step, x, row0, rows);
            start(step, warp, made[part & 1]);
            if (step > 0 && step % STEPS_A_PART == 0) {
                wait_for_products<1, MADE>(made[part - 1 & 1]);
                add(made[part - 1 & 1]);
            }
        }
        constexpr int LAST = (STEPS - 1) / STEPS_A_PART & 1;
        wait_for_products<0, MADE>(made[LAST]);
        add(made[LAST]);
        this->leave(sums, warp, 0);
    }

    // Start the products of a step.
    __device__ __forceinline__ void start(int step, int warp, float* own)
    {
        const char* at = shared + this->place_of(step);
        uint4 a[STEP];
#pragma unroll
        for (int k = 0; k < STEP; ++k)
            a[k] = ((const uint4*)at)[(warp * STEP + k) * 32 + lane];
        const unsigned long long x = describe_rows(at + WEIGHT_BYTES, STEP * BLOCK);
        begin_products();
#pragma unroll
        for (int k = 0; k < STEP; ++k)
            if (k == 0 && step % STEPS_A_PART == 0)
                multiply_group<OWN_ROWS, false>(own, a[k], x);
            else
                multiply_group<OWN_ROWS, true>(own, a[k], x + k * (BLOCK / 16));
        end_products();
    }

    // Add what a warp of product.cuh would have made.
    __device__ __forceinline__ void add(const float* part)
    {
#pragma unroll
        for (int i = 0; i < MADE; ++i)
            sums[0][i / 4][i % 4] += part[i];
    }

    // Four outputs of a tile for one row, all counted from the first.
    static __device__ __forceinline__ float4 total(int, int tile, int output, int row)
    {
        const float4 *first = (const float4*)Copies::sum_of(tile, output, row), a = first[0], b = first[Copies::SUMS / 4];
        return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
    }
};
#endif
