// Products of a weight matrix with the rows of a request: y[row][out] = sum over k of W[out][k] x[row][k].
//
// A CTA makes 16 * OUT_TILES outputs for ROWS rows. Its warps share k, each with a fixed range of k tiles (16 columns), and their
// sums are added in the order of the warps: a result depends on neither the number of rows nor what the others hold.
// Weights are stored tile by tile: [out tile][k tile][lane], 16 bytes a lane in the order of mma.m16n8k16's A fragments (float32:
// two times 16 bytes; lane l has row l % 16 and 8 columns from l / 16 * 8).
//
// NORMED: x is the float32 residual stream [rows][E_PAD], and RMSNorm is applied while it is read. The factor of a row comes from
// sums of squares over 16 columns each, [row][PARTIALS], which the kernel that wrote the stream left. The norm's weight is in W.
// Otherwise x is what `activation_index` describes.
#pragma once
#include "common.cuh"

#if STORAGE == FLOAT32
struct Weights { uint4 low, high; };
#else
typedef uint4 Weights;
#endif

__device__ __forceinline__ Weights load_weights(const uint4* matrix, long long tile, int lane)
{
#if STORAGE == FLOAT32
    return {load_streaming(matrix + tile * 64 + lane), load_streaming(matrix + tile * 64 + 32 + lane)};
#else
    return load_streaming(matrix + tile * 32 + lane);
#endif
}

#if STORAGE != FLOAT32
// c[16 outputs][8 rows] += a[16 outputs][16 k] b[16 k][8 rows], on the tensor cores.
__device__ __forceinline__ void multiply_tiles(float* c, const uint4& a, const uint2& b)
{
#if STORAGE == BFLOAT16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
#endif

template <bool FIRST, class A, class B> struct Either { typedef A type; };
template <class A, class B> struct Either<false, A, B> { typedef B type; };

// The factors that RMSNorm multiplies the CTA's rows by; a barrier must follow. Four threads a row: every CTA reads the sums of squares
// once, because all CTAs read the same few lines of the L2 cache at the same time.
template <int COUNT = ROWS>
__device__ __forceinline__ void norm_factors(const float* squares, int row0, int rows, float epsilon, float* factors)
{
    if (threadIdx.x >= COUNT * 4)
        return;
    const int local = threadIdx.x >> 2, row = row0 + local, lane = threadIdx.x & 3;
    float sum = 0.f;
    if (row < rows)
#pragma unroll
        for (int i = 0; i < PARTIALS / 16; ++i) {
            const float4 part = __ldcg((const float4*)(squares + (long long)row * PARTIALS) + i * 4 + lane);
            sum += (part.x + part.y) + (part.z + part.w);
        }
    sum = sum_lanes(sum, 1, 4);
    if (lane == 0)
        factors[local] = rsqrtf(sum / E + epsilon);
}

template <int OUT_TILES, int K_TILES, int WARPS, bool NORMED, int RT = ROW_TILES>
struct Product {
    static constexpr int RS = RT * 8;
    static constexpr int PER_WARP = (K_TILES + WARPS - 1) / WARPS;
#if STORAGE == FLOAT32
    static constexpr int MOST = 6 / OUT_TILES;
    static constexpr int SUMS = RS;           // of a lane: its output for every row
#else
    static constexpr int MOST = (WARPS > 8 && RT > 2 ? 6 : 12) / OUT_TILES;  // more would not fit beside the sums
    static constexpr int SUMS = RT * 4;  // of a lane: an accumulator of mma for every row tile
#endif
    static constexpr int HELD = PER_WARP < MOST ? PER_WARP : MOST;  // k tiles whose weights are in registers
    static constexpr int READS = HELD <= 8 ? HELD : (HELD + 1) / 2;  // k tiles of the rows that are read at once
    static constexpr bool EVEN = K_TILES % WARPS == 0 && PER_WARP % HELD == 0;  // no k tile is missing anywhere
    static constexpr int OUTPUTS = OUT_TILES * 16;
    typedef float Parts[WARPS][OUTPUTS][RS + 1];

    Weights held[OUT_TILES][HELD];
    float sums[OUT_TILES][SUMS];
    const uint4* matrix;
    int tile0, first, last, warp, lane;

    // Start to load weights for the outputs from a tile on; nothing that another kernel writes is read. `index` of the WARPS shares of k.
    __device__ __forceinline__ Product(const uint4* weights, int first_tile, int index) : matrix(weights), tile0(first_tile), warp(index)
    {
        lane = threadIdx.x & 31;
        first = warp * PER_WARP, last = min(first + PER_WARP, K_TILES);
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            load(i, first + i);
#pragma unroll
        for (int tile = 0; tile < OUT_TILES; ++tile)
#pragma unroll
            for (int i = 0; i < SUMS; ++i)
                sums[tile][i] = 0.f;
    }

    __device__ __forceinline__ void load(int place, int k_tile)
    {
        if ((EVEN && PER_WARP == HELD) || k_tile < last)
#pragma unroll
            for (int tile = 0; tile < OUT_TILES; ++tile)
                held[tile][place] =
                    load_weights(matrix, (long long)(tile0 + tile) * K_TILES + k_tile, lane);
    }

    __device__ __forceinline__ bool has(int k_tile) const { return EVEN || k_tile < last; }

    // Multiply by the rows from `row0` on; with NORMED, `factors` get what RMSNorm multiplies them by.
    __device__ __forceinline__ void run(const void* x, const float* squares, int row0, int rows, float epsilon, float* factors)
    {
#if STORAGE == FLOAT32
        if constexpr (NORMED)
            norm_factors<RS>(squares, row0, rows, epsilon, factors);  // applied to the sums, behind the next barrier
#pragma unroll 1
        for (int base = first; base < last; base += HELD)
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                if (has(base + i))
                    multiply(held, i, (const float*)x, row0, base + i);
                if constexpr (PER_WARP > HELD)
                    load(i, base + i + HELD);
            }
#else
        Read read[READS];
        fetch(read, x, row0, rows, first);
        if constexpr (NORMED) {
            norm_factors<RS>(squares, row0, rows, epsilon, factors);
            __syncthreads();
        }
#pragma unroll 1
        for (int base = first; base < last; base += HELD)
#pragma unroll
            for (int tile = 0; tile < RT; ++tile) {
                const float factor = NORMED ? factors[tile * 8 + (lane >> 2)] : 0.f;
#pragma unroll
                for (int start = 0; start < HELD; start += READS) {
                    if (tile || start || base != first) {
                        if (HELD * RT * OUT_TILES > 24)
                            asm volatile("" ::: "memory");  // no loads of many later row tiles before: registers would not do
                        fetch(read, x, row0 + tile * 8, rows, base + start);  // all loads before the first use of one
                    }
#pragma unroll
                    for (int i = 0; i < READS; ++i) {
                        if (start + i < HELD && has(base + start + i))
                            multiply(start + i, tile, fragment(read[i], factor));
                        if constexpr (PER_WARP > HELD)
                            if (tile == RT - 1 && start + i < HELD)
                                load(start + i, base + start + i + HELD);
                    }
                }
            }
#endif
    }

#if STORAGE == FLOAT32
    __device__ __forceinline__ void multiply(Weights (&w)[OUT_TILES][HELD], int place, const float* x, int row0, int k_tile)
    {
#pragma unroll
        for (int row = 0; row < RS; ++row) {
            const float4* at = (const float4*)(x + (long long)(row0 + row) * (K_TILES * 16) + k_tile * 16 + (lane >> 4) * 8);
            const float4 a = __ldcg(at), b = __ldcg(at + 1);
#pragma unroll
            for (int tile = 0; tile < OUT_TILES; ++tile) {
                const uint4 p = w[tile][place].low, q = w[tile][place].high;
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
    // What a lane reads of a k tile for its B fragment, and the fragment.
    typedef typename Either<NORMED, float4, uint2>::type Read;

    __device__ __forceinline__ void fetch(Read (&read)[READS], const void* x, int row0, int rows, int base)
    {
        const int row = row0 + (lane >> 2);
#pragma unroll
        for (int i = 0; i < READS; ++i) {
            const int k_tile = base + i;
            if (!has(k_tile))
                continue;
            if constexpr (NORMED) {
                const float4* at = (const float4*)((const float*)x + (long long)row * E_PAD + k_tile * 16) + (lane & 3);
                read[i] = row < rows ? __ldcg(at) : float4{0.f, 0.f, 0.f, 0.f};
            } else {
                read[i] = row < rows ? __ldcg((const uint2*)x + ((long long)(row0 >> 3) * K_TILES + k_tile) * 32 + lane) : uint2{0, 0};
            }
        }
    }

    static __device__ __forceinline__ uint2 fragment(const Read& read, float factor)
    {
        if constexpr (NORMED)
            return {narrow_two(read.x * factor, read.y * factor), narrow_two(read.z * factor, read.w * factor)};
        else
            return read;
    }

    __device__ __forceinline__ void multiply(int place, int row_tile, uint2 b)
    {
#pragma unroll
        for (int tile = 0; tile < OUT_TILES; ++tile)
            multiply_tiles(sums[tile] + row_tile * 4, held[tile][place], b);
    }
#endif

    // Leave this warp's sums for `total`; a barrier must follow.
    __device__ __forceinline__ void leave(Parts& parts)
    {
#pragma unroll
        for (int tile = 0; tile < OUT_TILES; ++tile) {
#if STORAGE == FLOAT32
#pragma unroll
            for (int row = 0; row < RS; ++row) {
                const float sum = sums[tile][row] + __shfl_xor_sync(0xffffffffu, sums[tile][row], 16);
                if (lane < 16)
                    parts[warp][tile * 16 + lane][row] = sum;
            }
#else
#pragma unroll
            for (int i = 0; i < SUMS; ++i)
                parts[warp][tile * 16 + (lane >> 2) + ((i & 2) << 2)][(i >> 2) * 8 + (lane & 3) * 2 + (i & 1)] = sums[tile][i];
#endif
        }
    }

    // One output of one row, both counted from the CTA's first.
    static __device__ __forceinline__ float total(const Parts& parts, int output, int row)
    {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i)
            sum += parts[i][output][row];
        return sum;
    }
};

// What all products do: load weights, wait, multiply, and hand every output to `finish(output, row, values, early)`. 16 neighbouring threads
// have the 16 outputs of a tile for one row, `values` has an entry for each of the CTA's tiles, and `early` is what `before(output, row)`
// returned right after the wait: values that `finish` needs from memory.
template <int OUT_TILES, int K_TILES, int WARPS, bool NORMED, class Before, class Finish>
__device__ __forceinline__ void product(const uint4* weights, const void* x, const float* squares, int rows, float epsilon,
                                        Before before, Finish finish)
{
    typedef Product<OUT_TILES, K_TILES, WARPS, NORMED> P;
    constexpr int ROUNDS = (16 * ROWS + WARPS * 32 - 1) / (WARPS * 32);
    __shared__ typename P::Parts parts;
    __shared__ float factors[ROWS];
    const int row0 = blockIdx.y * ROWS;
    P work(weights, blockIdx.x * OUT_TILES, threadIdx.x >> 5);
    let_next_start();
    wait_for_inputs();
    decltype(before(0, 0)) early[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = round * WARPS * 32 + threadIdx.x;
        if (i < 16 * ROWS)
            early[round] = before(i & 15, row0 + (i >> 4));
    }
    work.run(x, squares, row0, rows, epsilon, factors);
    work.leave(parts);
    __syncthreads();
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = round * WARPS * 32 + threadIdx.x, output = i & 15, row = i >> 4;
        if (i >= 16 * ROWS)
            break;
        float values[OUT_TILES];
#pragma unroll
        for (int tile = 0; tile < OUT_TILES; ++tile) {
            values[tile] = P::total(parts, tile * 16 + output, row);
#if STORAGE == FLOAT32
            if (NORMED)
                values[tile] *= factors[row];
#endif
        }
        finish(output, row0 + row, values, early[round]);
    }
}

struct Nothing { __device__ __forceinline__ int operator()(int, int) const { return 0; } };
