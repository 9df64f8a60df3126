// The two ends of a step: the embedding of the last token, and the output matrix with, if wanted, the best token.
#pragma once
#include "product.cuh"

// stream = scale * embedding[token]; a CTA a row, a warp for 16 columns at a time.
//   table [V'][E]; tokens int32 [rows]; stream float32 [rows][E_PAD]; squares float32 [rows][PARTIALS]
extern "C" __global__ void __launch_bounds__(256)
embed(const stored* table, const int* tokens, float* stream, float* squares, float scale)
{
    let_next_start();
    wait_for_inputs();
    const int row = blockIdx.x;
    const stored* from = table + (long long)tokens[row] * E;
    for (int i = threadIdx.x; i < (E_PAD + 31) / 32 * 32; i += 256) {
        const float value = i < E ? widen(from[i]) * scale : 0.f;
        if (i < E_PAD)
            stream[(long long)row * E_PAD + i] = value;
        const float square = sum_lanes(value * value, 1, 16);
        if ((i & 15) == 0 && i < E_PAD)
            squares[(long long)row * PARTIALS + i / 16] = square;
    }
}

// An order-preserving unsigned form of a float.
__device__ __forceinline__ unsigned sortable(float value)
{
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr int HEAD_WARPS = 8;

// logits[row][out] = scale * W[out] norm(stream[row]). If `best` is given, it receives by atomicMax (sortable logit, ~token) of every row,
// so the lowest token wins a tie; it must be zero before.
//   weights [V][E]; logits float32 [rows][V] or null; best uint64 [rows] or null
#if STORAGE == FLOAT32
// Grid (pairs of output tiles, row groups).
extern "C" __global__ void __launch_bounds__(HEAD_WARPS * 32)
output_head(const uint4* weights, const float* stream, const float* squares, float* logits, unsigned long long* best, int rows, float epsilon,
            float scale)
{
    const int tile = blockIdx.x;
    product<2, E_TILES, HEAD_WARPS, true>(weights, stream, squares, rows, epsilon, Nothing(), [&](int output, int row, const float* y, int) {
        unsigned long long top = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = (tile * 2 + i) * 16 + output;
            const float logit = y[i] * scale;
            if (token < V && row < rows) {
                if (logits)
                    logits[(long long)row * V + token] = logit;
                top = max(top, ((unsigned long long)sortable(logit) << 32) | (unsigned)~token);
            }
        }
        if (best) {
            for (int step = 1; step < 16; step <<= 1)
                top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
            if (output == 0 && row < rows)
                atomicMax(best + row, top);
        }
    });
}
#else
constexpr int HEAD_HELD = 16;  // k tiles whose weights are in registers

// A warp makes a tile of 16 outputs with all of k, from the normed stream in shared memory. Grid (8 output tiles, row groups);
// dynamic shared memory: ROW_TILES * E_TILES * 256 bytes.
extern "C" __global__ void __launch_bounds__(HEAD_WARPS * 32)
output_head(const uint4* weights, const float* stream, const float* squares, float* logits, unsigned long long* best, int rows, float epsilon,
            float scale)
{
    extern __shared__ uint2 fragments[];  // [row tile][k tile][lane]
    __shared__ unsigned long long tops[HEAD_WARPS][ROWS];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, tile = blockIdx.x * HEAD_WARPS + warp, row0 = blockIdx.y * ROWS;
    const bool has = tile < V_TILES;
    uint4 held[HEAD_HELD];
#pragma unroll
    for (int i = 0; i < HEAD_HELD; ++i)
        if (has && i < E_TILES)
            held[i] = load_weights(weights, (long long)tile * E_TILES + i, lane);
    let_next_start();
    wait_for_inputs();
    // this warp's k tiles of all rows: loads first
    constexpr int OWN = (E_TILES + HEAD_WARPS - 1) / HEAD_WARPS;
    float4 read[OWN];
    const auto fetch = [&](int t) {
        const int row = row0 + t * 8 + (lane >> 2);
        const float4* from = (const float4*)(stream + (long long)row * E_PAD) + (lane & 3);
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int k = i * HEAD_WARPS + warp;
            const bool needed = row < rows && k < E_TILES;
            read[i] = needed ? __ldcg(from + k * 4) : float4{0.f, 0.f, 0.f, 0.f};
        }
    };
    __shared__ float factors[ROWS];
    fetch(0);
    norm_factors(squares, row0, rows, epsilon, factors);
    __syncthreads();
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) {
        if (t)
            fetch(t);
        const float factor = factors[t * 8 + (lane >> 2)];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int k = i * HEAD_WARPS + warp;
            if (k < E_TILES)
                fragments[(t * E_TILES + k) * 32 + lane] = {narrow_two(read[i].x * factor, read[i].y * factor),
                                                            narrow_two(read[i].z * factor, read[i].w * factor)};
        }
    }
    __syncthreads();
    float sums[ROW_TILES][4] = {};
#pragma unroll 1
    for (int base = 0; base < E_TILES; base += HEAD_HELD)
#pragma unroll
        for (int i = 0; i < HEAD_HELD; ++i) {
            if (base + i < E_TILES)
#pragma unroll
                for (int t = 0; t < ROW_TILES; ++t)
                    multiply_tiles(sums[t], held[i], fragments[(t * E_TILES + base + i) * 32 + lane]);
            if (has && base + i + HEAD_HELD < E_TILES)
                held[i] = load_weights(weights, (long long)tile * E_TILES + base + i + HEAD_HELD, lane);
        }
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // the two rows of this lane
            const int local = t * 8 + (lane & 3) * 2 + j, row = row0 + local;
            unsigned long long top = 0;
#pragma unroll
            for (int i = 0; i < 2; ++i) {  // and its two outputs
                const int token = tile * 16 + (lane >> 2) + i * 8;
                const float logit = sums[t][i * 2 + j] * scale;
                if (has && token < V && row < rows) {
                    if (logits)
                        logits[(long long)row * V + token] = logit;
                    top = max(top, ((unsigned long long)sortable(logit) << 32) | (unsigned)~token);
                }
            }
#pragma unroll
            for (int step = 4; step < 32; step <<= 1)
                top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
            if (lane < 4)
                tops[warp][local] = top;
        }
    if (!best)
        return;
    __syncthreads();
    if (threadIdx.x < ROWS && row0 + threadIdx.x < rows) {
        unsigned long long top = 0;
#pragma unroll
        for (int i = 0; i < HEAD_WARPS; ++i)
            top = max(top, tops[i][threadIdx.x]);
        atomicMax(best + row0 + threadIdx.x, top);
    }
}
#endif
