// The body of a kernel that makes a product: of product.cuh, streamed_product.cuh, group_product.cuh or tiled_product.cuh.
#pragma once
#include "product.cuh"

__device__ __forceinline__ float times(float x, float a, float b) { return x * a * b; }
__device__ __forceinline__ float4 times(const float4& x, float a, float b) { return {x.x * a * b, x.y * a * b, x.z * a * b, x.w * a * b}; }

// What a thread hands over of a tile of outputs for a row.
template <class P> using Outputs = decltype(P::total(0, 0, 0, 0));

// How a product's threads share what they hand over. A team has a thread for every output of a tile and row (or four outputs). Teams take turns, as far as
// there are turns; those of one turn share its tiles, by UNIT that stay together.
template <class P, int UNIT> struct Teams {
    static constexpr int COUNT = 16 / P::WIDTH * P::OWN_ROWS, ALL = most(1, P::THREADS / COUNT), TURNS = least(P::TURNS, ALL);
    static constexpr int OF_A_TURN = largest_part(P::TOGETHER / UNIT, least(P::TOGETHER / UNIT, ALL / TURNS));
    static constexpr int HANDED = P::TOGETHER / OF_A_TURN;  // tiles of which a thread has outputs
};

// What all products do: load weights, wait, multiply, and hand every output to `finish(tile, output, row, values, early)`. 16 neighbouring
// threads have the 16 outputs of a tile for one row, or four threads have four each (WIDTH). `values` has an entry for each of HANDED tiles
// from `tile` on, and `early` is what `before(output, row)` returned right after the wait: values that `finish` needs from memory. Outputs of
// tiles beyond the last one mean nothing. A product of several turns hands over the tiles of one after the other.
template <class P, int UNIT, class Before, class Finish>
__device__ __forceinline__ void product(const uint4* weights, const void* x, const Norm& norm, int rows, Before before, Finish finish)
{
    typedef Teams<P, UNIT> T;
    constexpr int A_ROW = 16 / P::WIDTH, COUNT = T::COUNT, ROUNDS = (COUNT + P::THREADS - 1) / P::THREADS, HANDED = T::HANDED;
    __shared__ float factors[P::OWN_ROWS];
    __shared__ __align__(16) float output_scales[INT8 ? P::TILES * 16 : 1];
    const int row0 = blockIdx.y * P::OWN_ROWS, tile0 = blockIdx.x * P::TILES;
    constexpr bool SHARES = T::TURNS * T::OF_A_TURN > 1;
    const int own = SHARES ? threadIdx.x % COUNT : threadIdx.x, team = SHARES ? threadIdx.x / COUNT : 0;
    const int first = team / T::TURNS * HANDED;  // of a turn's tiles, that this thread hands over
    constexpr bool FEW_ROWS = ROW_TILES == 1;  // then it is worth more that the next kernel loads its weights early than that these come first
    if (FEW_ROWS)
        let_next_start();
    copy_scales<P>(weights, tile0, output_scales);
    P work(weights, tile0);
    if (!FEW_ROWS)
        let_next_start();
    typedef NormFactors<P::THREADS, P::OWN_ROWS> Factors;
    Factors of_norm(norm, row0, rows);
    constexpr bool LATE = P::IS_NORMED && Factors::LATE && P::CTAS == 1;  // two CTAs have no registers for that
    decltype(before(0, 0)) early[ROUNDS];
    const auto read_early = [&] {
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            const int i = round * P::THREADS + own;
            if (i < COUNT)
                early[round] = before(i % A_ROW * P::WIDTH, row0 + i / A_ROW);
        }
    };
    constexpr bool EARLY_FIRST = INT8 && !FEW_ROWS;  // or 8-bit weights would leave too few registers
    wait_for_inputs();
    if (P::IS_NORMED && !LATE)
        of_norm.load();
    if (EARLY_FIRST)
        read_early();
    work.begin(x, row0, rows);
    if (LATE)
        of_norm.load();
    if (!EARLY_FIRST)
        read_early();
    if (P::IS_NORMED && !LATE)
        of_norm.leave(factors);
#pragma unroll
    for (int turn = 0; turn < P::TURNS; ++turn) {
        work.run(turn, x, row0, rows);
        if (LATE && turn == 0)
            of_norm.leave(factors);
        __syncthreads();
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            const int i = round * P::THREADS + own, output = i % A_ROW * P::WIDTH, row = i / A_ROW;
            if (i >= COUNT || (SHARES && (team % T::TURNS != turn % T::TURNS || first >= P::TOGETHER)))
                break;
            Outputs<P> values[HANDED];
#pragma unroll
            for (int t = 0; t < HANDED; ++t)
                values[t] = times(P::total(turn, first + t, output, row), (P::IS_NORMED ? factors[row] : 1.f),
                                  INT8 ? output_scales[(turn * P::TOGETHER + first + t) * 16 + output] : 1.f);
            finish(tile0 + turn * P::TOGETHER + first, output, row0 + row, values, early[round]);
        }
        work.end_turn(turn);
    }
    if (P::IS_NORMED)
        of_norm.leave_scales();
}

struct Nothing { __device__ __forceinline__ int operator()(int, int) const { return 0; } };
