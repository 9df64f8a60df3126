// The body of a kernel that makes a product: of product.cuh, streamed_product.cuh or tiled_product.cuh.
#pragma once
#include "product.cuh"

// What all products do: load weights, wait, multiply, and hand every output to `finish(tile, output, row, values, early)`. 16 neighbouring
// threads have the 16 outputs of a tile for one row, `values` has an entry for each of TOGETHER tiles from `tile` on, and `early` is what
// `before(output, row)` returned right after the wait: values that `finish` needs from memory. Outputs of tiles beyond the last one mean
// nothing. A product of several turns hands over the tiles of one after the other.
template <class P, class Before, class Finish>
__device__ __forceinline__ void product(const uint4* weights, const void* x, const Norm& norm, int rows, Before before, Finish finish)
{
    constexpr int COUNT = 16 * P::OWN_ROWS, ROUNDS = (COUNT + P::THREADS - 1) / P::THREADS;
    constexpr int TEAMS = most(1, least(P::TURNS, P::THREADS / COUNT));  // of threads, which hand over in turns
    __shared__ float factors[P::OWN_ROWS];
    __shared__ __align__(16) float output_scales[INT8 ? P::TILES * 16 : 1];
    const int row0 = blockIdx.y * P::OWN_ROWS, tile0 = blockIdx.x * P::TILES;
    const int own = TEAMS > 1 ? threadIdx.x % COUNT : threadIdx.x, team = TEAMS > 1 ? threadIdx.x / COUNT : 0;
    copy_scales<P>(weights, tile0, output_scales);
    P work(weights, tile0);
    let_next_start();
    wait_for_inputs();
    decltype(before(0, 0)) early[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = round * P::THREADS + own;
        if (i < COUNT)
            early[round] = before(i & 15, row0 + (i >> 4));
    }
    work.begin(x, row0, rows);
    if constexpr (P::IS_NORMED)
        norm_factors<P::THREADS, P::OWN_ROWS>(norm, row0, rows, factors);
#pragma unroll
    for (int turn = 0; turn < P::TURNS; ++turn) {
        work.run(turn, x, row0, rows);
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            const int i = round * P::THREADS + own, output = i & 15, row = i >> 4;
            if (i >= COUNT || (TEAMS > 1 && team != turn % TEAMS))
                break;
            float values[P::TOGETHER];
#pragma unroll
            for (int t = 0; t < P::TOGETHER; ++t)
                values[t] = P::total(turn, t, output, row) * (P::IS_NORMED ? factors[row] : 1.f)
                            * (INT8 ? output_scales[(turn * P::TOGETHER + t) * 16 + output] : 1.f);
            finish(tile0 + turn * P::TOGETHER, output, row0 + row, values, early[round]);
        }
        work.end_turn(turn);
    }
}

struct Nothing { __device__ __forceinline__ int operator()(int, int) const { return 0; } };
