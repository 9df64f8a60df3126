// Products of a weight matrix with the rows of a request: y[row][out] = sum over k of W[out][k] x[row][k].
//
// A CTA makes 16 * OUT_TILES outputs for 8 * OWN_ROW_TILES rows. Its warps share k, each with a fixed range of k tiles. Their sums are added in a
// fixed order, so a result depends on neither the number of rows nor what the others hold: of a product that norms those of each half of the warps
// one after the other, then both (`TiledCopies` has halves, too), of others in pairs (CTAs that share k have neighbouring warps' parts).
//
// NORMED: RMSNorm of x, whose weight is in W, is a factor of each row's outputs (norm.cuh).
#pragma once
#include "norm.cuh"
#include "operands.cuh"

constexpr int PRODUCT_WARPS = 16, HALVES = 2;  // parts of k of a layer's product, and the sums that they are first added to

// Shared memory that a CTA takes for rows: two of them fit on an SM of sm_90, one on that of every GPU from sm_80 on. Sums may take more where there is more.
constexpr int SHARED_BYTES = 98 * 1024;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1100)
constexpr int MOST_SHARED = SHARED_BYTES;
#else
constexpr int MOST_SHARED = 224 * 1024;
#endif

constexpr int STRIDE = 20;  // of the sums of a row in shared memory, of which there are 16: two rows have twice as much

// Where the 16 sums of a row begin, counted from those of an even row. A lane's accumulators do not lie in the same banks, nor do those of two rows that a
// warp reads together, 16 sums of each, if these lie IN_PAIRS.
template <bool IN_PAIRS = true> __device__ __forceinline__ int sums_of_row(int row)
{
    return IN_PAIRS ? (row >> 1) * (2 * STRIDE) + (row & 1) * 16 : row * STRIDE;
}

// Leave a lane's accumulators of mma for COUNT / 4 row tiles in shared memory.
template <int COUNT, bool IN_PAIRS = true> __device__ __forceinline__ void store_sums(float* to, const float* sums, int lane)
{
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        to[sums_of_row<IN_PAIRS>((i >> 2) * 8 + (lane & 3) * 2 + (i & 1)) + (lane >> 2) + ((i & 2) << 2)] = sums[i];
}

// The largest part of `limit` or less that goes into `count` without rest, which saves a loop its conditions; `limit` if that is too small.
__host__ __device__ constexpr int largest_part(int count, int limit) { return count % limit ? largest_part(count, limit - 1) : limit; }
__host__ __device__ constexpr int even_part(int count, int limit)
{
    return largest_part(count, limit) * 2 >= limit ? largest_part(count, limit) : limit;
}

// Neighbours are added, then neighbouring sums, until one is left: of COUNT values, a power of two.
__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float4 add(const float4& a, const float4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
template <int COUNT, class T> __device__ __forceinline__ T sum_in_pairs(T* values)
{
#pragma unroll
    for (int step = 1; step < COUNT; step *= 2)
#pragma unroll
        for (int i = 0; i < COUNT; i += 2 * step)
            values[i] = add(values[i], values[i + step]);
    return values[0];
}

// Most k tiles that registers hold; on older GPUs the compiler would spill some of 16.
#if __CUDA_ARCH__ >= 900
constexpr int MOST_HELD = 16;
#else
constexpr int MOST_HELD = 12;
#endif

// TOTAL: tiles of outputs in all. OWN_ROW_TILES: tiles of 8 rows of a CTA.
template <int TOTAL, int OUT_TILES, int OWN_ROW_TILES, int K_TILES, int WARPS, bool NORMED>
struct Product {
    static constexpr int TOTAL_TILES = TOTAL, TILES = OUT_TILES, TOGETHER = OUT_TILES, TURNS = 1, WIDTH = 1, INPUTS = K_TILES, THREADS = WARPS * 32, OWN_ROWS = OWN_ROW_TILES * 8;
    static constexpr int CLUSTER_CTAS = 1;
    static constexpr bool IS_NORMED = NORMED;
    static constexpr int PER_WARP = (K_TILES + WARPS - 1) / WARPS;
#if STORAGE == FLOAT32
    static constexpr int MOST = (PER_WARP * OUT_TILES > 6 ? 4 : 6) / OUT_TILES;  // fewer where a loop holds on to addresses
    static constexpr int SUMS = OWN_ROWS;  // of a lane: its output for every row
    static constexpr bool STAGED = false;
#else
    // more would not fit beside the sums; fewer where a loop holds on to the addresses of several tiles
#if INT8
    // a k tile's rows take as many registers as its weights
    static constexpr bool STAGED = OWN_ROW_TILES > 1 || PER_WARP * (OUT_TILES + 1) > 16;
    static constexpr int MOST = least(12, 16 / OUT_TILES - OWN_ROW_TILES);
#else
    static constexpr bool STAGED = OWN_ROW_TILES > 1;  // rows go through shared memory, so that all loads are under way at once
    static constexpr int MOST = least(MOST_HELD, (PER_WARP * OUT_TILES > 24 && OUT_TILES > 1 ? 16 : 24) / OUT_TILES);
#endif
    static constexpr int SUMS = OWN_ROW_TILES * 4;  // of a lane: an accumulator of mma for every row tile
#endif
    static constexpr int FITTING = STAGED ? SHARED_BYTES / (WARPS * OWN_ROW_TILES * BLOCK) : MOST;
    static constexpr int LIMIT = least(PER_WARP, least(MOST, FITTING));
    static constexpr int HELD = K_TILES % WARPS ? LIMIT : even_part(PER_WARP, LIMIT);  // k tiles whose weights are in registers, and rows on their way
    static constexpr int CTAS = INT8 && !STAGED && OUT_TILES * (HELD + 1) + HELD <= 8 ? 2 : 1;  // that an SM has registers for: twice the loads
    static constexpr bool EVEN = K_TILES % WARPS == 0 && PER_WARP % HELD == 0;  // no k tile is missing anywhere
    static constexpr bool UNROLLED = EVEN && PER_WARP * OUT_TILES * OWN_ROW_TILES <= 64;  // there is no loop, as long as its code stays short
    static constexpr int PARTS = OUT_TILES * OWN_ROWS * STRIDE;
    static constexpr int REGION = most(STAGED ? HELD * OWN_ROW_TILES * BLOCK : 0, PARTS * 4);  // shared memory of a warp: rows, then sums
    static constexpr int SHARED = WARPS * REGION;
    static_assert(SHARED <= MOST_SHARED, "shared memory");
    static_assert(!WARPGROUPS || STAGED, "what `fetch` reads into registers is not in the order of warp groups");

    Weights held[OUT_TILES][HELD];
    float sums[OUT_TILES][SUMS];
#if STORAGE != FLOAT32
    Rows read[STAGED ? 1 : HELD];
#endif
    const uint4* matrix;  // a lane's weights of the first tile of outputs and the warp's first k tile
    char* region;
    int tile0, first, last, lane;

    // Start to load weights for the outputs from a tile on; nothing that another kernel writes is read.
    __device__ __forceinline__ Product(const uint4* weights, int first_tile) : tile0(first_tile)
    {
        const int warp = threadIdx.x >> 5;
        lane = threadIdx.x & 31, region = shared + warp * REGION;
        first = warp * PER_WARP, last = min(first + PER_WARP, K_TILES);
        matrix = count_from(weights_at<K_TILES>(weights, tile0, first) + lane);
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            load(i, first + i, has(first + i), true);
#pragma unroll
        for (int tile = 0; tile < OUT_TILES; ++tile)
#pragma unroll
            for (int i = 0; i < SUMS; ++i)
                sums[tile][i] = 0.f;
    }

    __device__ __forceinline__ void load(int place, int k_tile, bool there, bool early = false)
    {
        if (there)
#pragma unroll
            for (int tile = 0; tile < OUT_TILES; ++tile)
                held[tile][place] = load_weights(of_tile<TOTAL, OUT_TILES, K_TILES>(matrix, tile0, tile) + (k_tile - first) * WEIGHT_PIECES, early);
    }

    __device__ __forceinline__ bool has(int k_tile) const { return EVEN || k_tile < last; }
    // Whether there is a k tile `next` ones behind the first of a round, in the next round: all of them or none, if none is missing anywhere.
    __device__ __forceinline__ bool has_next(int base, int next) const { return base + (EVEN ? HELD : next) < last; }

    // Start to read the rows from `row0` on.
    __device__ __forceinline__ void begin(const void* x, int row0, int rows)
    {
#if STORAGE != FLOAT32
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            fetch(i, x, row0, rows, first, i, has(first + i));
#endif
    }

    // Multiply by them, and leave the sums for `total`; a barrier must follow.
    __device__ __forceinline__ void run(int, const void* x, int row0, int rows)
    {
        multiply_all(x, row0, rows);
        if (INT8)
            wait_for_group<0>();
        leave();
    }
    __device__ __forceinline__ void end_turn(int) {}

    __device__ __forceinline__ void multiply_all(const void* x, int row0, int rows)
    {
#if STORAGE == FLOAT32
#pragma unroll 1
        for (int base = first; base < last; base += HELD)
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (has(base + i))
                    multiply(i, (const float*)x, row0, base + i);
                if constexpr (PER_WARP > HELD)
                    load(i, base + i + HELD, has_next(base, i + HELD));
            }
#else
        if constexpr (UNROLLED) {
#pragma unroll
            for (int done = 0; done < PER_WARP; done += HELD)
                multiply_round(x, row0, rows, first, done);
        } else
#pragma unroll 1
            for (int base = first; base < last; base += HELD)
                multiply_round(x, row0, rows, base, 0);
#endif
    }

#if STORAGE != FLOAT32
    // Multiply by HELD k tiles from `base` + `done` on, and start to read the next ones.
    __device__ __forceinline__ void multiply_round(const void* x, int row0, int rows, int base, int done)
    {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int next = done + i + HELD;
            const bool there = UNROLLED ? next < PER_WARP : has_next(base, next);
            if constexpr (STAGED) {
                wait_for_group<HELD - 1>();
                __syncwarp();  // other lanes have copied a part
            }
            if (has(base + done + i))
                multiply(i, [&](int t) { return STAGED ? lane_rows(region + (i * OWN_ROW_TILES + t) * BLOCK, lane) : read[STAGED ? 0 : i]; });
            if constexpr (PER_WARP > HELD) {
                if (STAGED)
                    __syncwarp();
                load(i, base + next, there);
                fetch(i, x, row0, rows, base, next, there);
            } else if (STAGED)
                end_group();  // an empty one: the next wait counts groups
        }
    }
#endif

#if STORAGE == FLOAT32
    __device__ __forceinline__ void multiply(int place, const float* x, int row0, int k_tile)
    {
#pragma unroll
        for (int row = 0; row < OWN_ROWS; ++row) {
            const float4* at = (const float4*)(x + (long long)(row0 + row) * (K_TILES * 16) + k_tile * 16 + (lane >> 4) * 8);
            const float4 a = __ldcg(at), b = __ldcg(at + 1);
#pragma unroll
            for (int tile = 0; tile < OUT_TILES; ++tile) {
                const uint4 p = held[tile][place].low, q = held[tile][place].high;
                float sum = sums[tile][row];
                sum = fmaf(__uint_as_float(p.x), a.x, sum), sum = fmaf(__uint_as_float(p.y), a.y, sum);
                sum = fmaf(__uint_as_float(p.z), a.z, sum), sum = fmaf(__uint_as_float(p.w), a.w, sum);
                sum = fmaf(__uint_as_float(q.x), b.x, sum), sum = fmaf(__uint_as_float(q.y), b.y, sum);
                sum = fmaf(__uint_as_float(q.z), b.z, sum), sum = fmaf(__uint_as_float(q.w), b.w, sum);
                sums[tile][row] = sum;
            }
        }
    }
#else
    // Start to read a lane's B fragments of k tile `k_tile` + `more`: of 8 rows into a register, or of all rows into shared memory.
    __device__ __forceinline__ void fetch(int place, const void* x, int row0, int rows, int k_tile, int more, bool there)
    {
        if constexpr (!STAGED) {
            if (there)
                read[place] = load_in_order((const Rows*)x + ((long long)(row0 >> 3) * K_TILES + k_tile) * 32 + lane_of_rows(lane, rows - row0)
                                             + more * 32);
        } else {
            const unsigned to = (unsigned)__cvta_generic_to_shared(region) + place * OWN_ROW_TILES * BLOCK;
            if (there)
                copy_row_tiles<32, OWN_ROW_TILES, 1, K_TILES>(to, x, k_tile, more, row0, rows, lane);
            end_group();
        }
    }

    // Multiply by a k tile of all rows; x(t) is the lane's part of row tile t.
    template <class RowTile>
    __device__ __forceinline__ void multiply(int place, RowTile x)
    {
#if INT8
        Rows b[OWN_ROW_TILES];
#pragma unroll
        for (int t = 0; t < OWN_ROW_TILES; ++t)
            b[t] = x(t);
#pragma unroll
        for (int tile = 0; tile < OUT_TILES; ++tile) {
            const Widened a(held[tile][place]);
#pragma unroll
            for (int t = 0; t < OWN_ROW_TILES; ++t)
                multiply_tiles(sums[tile] + t * 4, a, b[t]);
        }
#else
#pragma unroll
        for (int t = 0; t < OWN_ROW_TILES; ++t) {
            const Rows b = x(t);
#pragma unroll
            for (int tile = 0; tile < OUT_TILES; ++tile)
                multiply_tiles(sums[tile] + t * 4, held[tile][place], b);
        }
#endif
    }
#endif

    __device__ __forceinline__ void leave()
    {
        if (STAGED)
            __syncwarp();  // the rows lie where the sums go
        float* parts = (float*)region;
#pragma unroll
        for (int tile = 0; tile < OUT_TILES; ++tile) {
            float* own = parts + tile * OWN_ROWS * STRIDE;
#if STORAGE == FLOAT32
#pragma unroll
            for (int row = 0; row < OWN_ROWS; ++row) {
                const float sum = sums[tile][row] + __shfl_xor_sync(0xffffffffu, sums[tile][row], 16);
                if (lane < 16)
                    own[sums_of_row(row) + lane] = sum;
            }
#else
            store_sums<SUMS>(own, sums[tile], lane);
#endif
        }
    }

    // One output of a tile for one row, both counted from the first.
    static __device__ __forceinline__ float total(int, int tile, int output, int row)
    {
        static_assert(WARPS % HALVES == 0, "warps");
        const auto of = [&](int warp) { return ((const float*)(shared + warp * REGION))[tile * OWN_ROWS * STRIDE + sums_of_row(row) + output]; };
        float sums[WARPS] = {};
        if constexpr (NORMED) {
#pragma unroll
            for (int i = 0; i < WARPS; ++i)
                sums[i / (WARPS / HALVES)] += of(i);
            return sums[0] + sums[1];
        } else {
#pragma unroll
            for (int i = 0; i < WARPS; ++i)
                sums[i] = of(i);
            return sum_in_pairs<WARPS>(sums);
        }
    }
};
