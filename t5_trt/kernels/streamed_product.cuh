// Products with many more tiles of outputs than multiprocessors: the sums of product.cuh, bit for bit. A CTA makes several tiles one after
// the other, for which it reads its rows once, while the weights of the next tiles are on their way into registers.
#pragma once
#include "product.cuh"

#if STORAGE != FLOAT32
// Shared memory that a CTA may take; it is alone on its multiprocessor.
constexpr int STREAMED_BYTES = 220 * 1024;

// TOTAL: tiles of outputs in all. OUT_TILES: of a CTA. IN_ONE: tiles whose outputs are handed over together.
template <int TOTAL, int OUT_TILES, int IN_ONE, int OWN_ROW_TILES, int K_TILES>
struct StreamedProduct {
    static constexpr int TOTAL_TILES = TOTAL, TILES = OUT_TILES, TOGETHER = IN_ONE, TURNS = OUT_TILES / IN_ONE, WIDTH = 1, INPUTS = K_TILES;
    static constexpr int WARPS = PRODUCT_WARPS, THREADS = WARPS * 32, OWN_ROWS = OWN_ROW_TILES * 8, CTAS = 1, CLUSTER_CTAS = 1;
    static constexpr bool IS_NORMED = true, STAGED = OWN_ROW_TILES > 1;  // rows lie in shared memory, those of one row tile in registers
    static constexpr int PER_WARP = (K_TILES + WARPS - 1) / WARPS;
    static constexpr bool EVEN = K_TILES % WARPS == 0;
    // tiles of outputs whose weights are in registers; 8-bit weights take more when they are used
    static constexpr int HELD = least(OUT_TILES, most(IN_ONE, (INT8 ? 12 : MOST_HELD) / PER_WARP));
    static constexpr int ROW_BYTES = STAGED ? PER_WARP * OWN_ROW_TILES * BLOCK : 0, SUMS = OWN_ROWS * STRIDE * 4;  // bytes of a warp
    static constexpr int TURN = WARPS * IN_ONE * SUMS;
    static constexpr int BUFFERS = TURNS == 1 || WARPS * ROW_BYTES + 2 * TURN > STREAMED_BYTES ? 1 : 2;  // of sums, so that turns may overlap
    static constexpr int SHARED = WARPS * ROW_BYTES + BUFFERS * TURN;
    static constexpr bool IN_PAIRS = STAGED;  // rows' sums, see `sums_of_row`: with one row tile it is slower
    static_assert(OUT_TILES % IN_ONE == 0 && SHARED <= STREAMED_BYTES, "tiles of a CTA");

    Weights held[HELD][PER_WARP];
    Rows read[STAGED ? 1 : PER_WARP];
    float sums[IN_ONE][OWN_ROW_TILES * 4];
    const uint4* matrix;  // a lane's weights of the first tile of outputs and the warp's first k tile
    char* region;
    int tile0, first, last, lane;

    // Start to load weights; nothing that another kernel writes is read.
    __device__ __forceinline__ StreamedProduct(const uint4* weights, int first_tile) : tile0(first_tile)
    {
        const int warp = threadIdx.x >> 5;
        lane = threadIdx.x & 31, region = shared + warp * ROW_BYTES;
        first = warp * PER_WARP, last = min(first + PER_WARP, K_TILES);
        matrix = count_from(weights_at<K_TILES>(weights, tile0, first) + lane);
#pragma unroll
        for (int tile = 0; tile < HELD; ++tile)
            load(tile, true);
    }

    __device__ __forceinline__ bool has(int k_tile) const { return EVEN || k_tile < last; }

    __device__ __forceinline__ void load(int tile, bool early = false)
    {
#pragma unroll
        for (int i = 0; i < PER_WARP; ++i)
            if (has(first + i))
                held[tile % HELD][i] = load_weights(of_tile<TOTAL, OUT_TILES, K_TILES>(matrix, tile0, tile) + i * WEIGHT_PIECES, early);
    }

    // Start to read the rows from `row0` on.
    __device__ __forceinline__ void begin(const void* x, int row0, int rows)
    {
#pragma unroll
        for (int i = 0; i < PER_WARP; ++i) {
            if (!has(first + i))
                continue;
            if constexpr (!STAGED)
                read[i] = load_in_order((const Rows*)x + ((long long)(row0 >> 3) * K_TILES + first) * 32 + lane_of_rows(lane, rows - row0) + i * 32);
            else
                copy_row_tiles<32, OWN_ROW_TILES, 1, K_TILES>((unsigned)__cvta_generic_to_shared(region) + i * OWN_ROW_TILES * BLOCK, x, first, i,
                                                              row0, rows, lane);
        }
        end_group();
    }

    // Make the sums of a turn's tiles and leave them for `total`; a barrier must follow.
    __device__ __forceinline__ void run(int turn, const void*, int, int)
    {
        if (turn == 0) {
            wait_for_group<0>();
            __syncwarp();  // other lanes have copied a part
        }
#pragma unroll
        for (int i = 0; i < IN_ONE; ++i)
#pragma unroll
            for (int j = 0; j < OWN_ROW_TILES * 4; ++j)
                sums[i][j] = 0.f;
#pragma unroll
        for (int i = 0; i < PER_WARP; ++i)
            if (has(first + i))
                multiply(turn, i);
#pragma unroll
        for (int i = 0; i < IN_ONE; ++i) {
            const int tile = turn * IN_ONE + i;
            if (tile + HELD < OUT_TILES)
                load(tile + HELD);
            float* own = (float*)(shared + WARPS * ROW_BYTES + turn % BUFFERS * TURN + ((threadIdx.x >> 5) * IN_ONE + i) * SUMS);
            store_sums<OWN_ROW_TILES * 4, IN_PAIRS>(own, sums[i], lane);
        }
    }

    // Multiply by the k tile `i` of the warp's.
    __device__ __forceinline__ void multiply(int turn, int i)
    {
        const Rows* x = STAGED ? (const Rows*)(region + i * OWN_ROW_TILES * BLOCK) + lane : read + i;
        Factor a[IN_ONE];
#pragma unroll
        for (int tile = 0; tile < IN_ONE; ++tile)
            a[tile] = Factor(held[(turn * IN_ONE + tile) % HELD][i]);
#pragma unroll
        for (int t = 0; t < OWN_ROW_TILES; ++t) {
            const Rows b = x[t * 32];
#pragma unroll
            for (int tile = 0; tile < IN_ONE; ++tile)
                multiply_tiles(sums[tile] + t * 4, a[tile], b);
        }
    }

    // After the outputs of a turn were read.
    __device__ __forceinline__ void end_turn(int turn)
    {
        if (BUFFERS == 1 && turn + 1 < TURNS)
            __syncthreads();
    }

    // One output of a tile of a turn for one row, all counted from the first.
    static __device__ __forceinline__ float total(int turn, int tile, int output, int row)
    {
        float sums[HALVES] = {};
#pragma unroll
        for (int i = 0; i < WARPS; ++i)
            sums[i / (WARPS / HALVES)] += ((const float*)(shared + WARPS * ROW_BYTES + turn % BUFFERS * TURN + (i * IN_ONE + tile) * SUMS))[sums_of_row<IN_PAIRS>(row) + output];
        return sums[0] + sums[1];
    }
};
#endif
