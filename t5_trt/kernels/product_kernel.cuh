// The body of a kernel that makes a product: of product.cuh, streamed_product.cuh, group_product.cuh or tiled_product.cuh.
#pragma once
#include "product.cuh"

__device__ __forceinline__ float times(float x, float a, float b) { return x * a * b; }
__device__ __forceinline__ float4 times(const float4& x, float a, float b) { return {x.x * a * b, x.y * a * b, x.z * a * b, x.w * a * b}; }

// What a thread hands over of a tile of outputs for a row.
template <class P> using Outputs = decltype(P::total(0, 0, 0, 0));

// What all products do: load weights, wait, multiply, and hand every output to `finish(tile, output, row, values, early)`. 16 neighbouring
// threads have the 16 outputs of a tile for one row, or four threads have four each (WIDTH). `values` has an entry for each of TOGETHER tiles
// from `tile` on, and `early` is what `before(output, row)` returned right after the wait: values that `finish` needs from memory. Outputs of
// tiles beyond the last one mean nothing. A product of several turns hands over the tiles of one after the other.
template <class P, class Before, class Finish>
__device__ __forceinline__ void product(const uint4* weights, const void* x, const Norm& norm, int rows, Before before, Finish finish)
{
    constexpr int A_ROW = 16 / P::WIDTH, COUNT = A_ROW * P::OWN_ROWS, ROUNDS = (COUNT + P::THREADS - 1) / P::THREADS;
    constexpr int TEAMS = most(1, least(P::TURNS, P::THREADS / COUNT));  // of threads, which hand over in turns
    __shared__ float factors[P::OWN_ROWS];
    __shared__ __align__(16) float output_scales[INT8 ? P::TILES * 16 : 1];
    const int row0 = blockIdx.y * P::OWN_ROWS, tile0 = blockIdx.x * P::TILES;
    const int own = TEAMS > 1 ? threadIdx.x % COUNT : threadIdx.x, team = TEAMS > 1 ? threadIdx.x / COUNT : 0;
    constexpr bool FEW_ROWS = ROW_TILES == 1;  // then it is worth more that the next kernel loads its weights early than that these come first
    if (FEW_ROWS)
        let_next_start();
    copy_scales<P>(weights, tile0, output_scales);
    P work(weights, tile0);
    if (!FEW_ROWS)
        let_next_start();
    wait_for_inputs();
    decltype(before(0, 0)) early[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = round * P::THREADS + own;
        if (i < COUNT)
            early[round] = before(i % A_ROW * P::WIDTH, row0 + i / A_ROW);
    }
    work.begin(x, row0, rows);
    if constexpr (P::IS_NORMED)
        norm_factors<P::THREADS, P::OWN_ROWS>(norm, row0, rows, factors);
#pragma unroll
    for (int turn = 0; turn < P::TURNS; ++turn) {
        work.run(turn, x, row0, rows);
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            const int i = round * P::THREADS + own, output = i % A_ROW * P::WIDTH, row = i / A_ROW;
            if (i >= COUNT || (TEAMS > 1 && team != turn % TEAMS))
                break;
            Outputs<P> values[P::TOGETHER];
#pragma unroll
            for (int t = 0; t < P::TOGETHER; ++t)
                values[t] = times(P::total(turn, t, output, row), (P::IS_NORMED ? factors[row] : 1.f),
                                  INT8 ? output_scales[(turn * P::TOGETHER + t) * 16 + output] : 1.f);
            finish(tile0 + turn * P::TOGETHER, output, row0 + row, values, early[round]);
        }
        work.end_turn(turn);
    }
}

struct Nothing { __device__ __forceinline__ int operator()(int, int) const { return 0; } };
