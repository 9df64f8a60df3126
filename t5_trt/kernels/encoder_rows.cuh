// What an encoder does to rows between its products: the residual sum with its norm, the activation, and cross-attention's K/V by heads.
#pragma once
#include "types.cuh"

constexpr int VECTORS = E / 8;  // of a row, 8 values each
constexpr int ROW_WARPS = VECTORS <= 128 ? 1 : VECTORS <= 256 ? 2 : 4;  // that share a row
constexpr int ROWS_OF_CTA = 4 / ROW_WARPS, HELD_VECTORS = (VECTORS + 32 * ROW_WARPS - 1) / (32 * ROW_WARPS);

__device__ __forceinline__ uint4 pack(const float* values)
{
    return make_uint4(narrow_two(values[0], values[1]), narrow_two(values[2], values[3]), narrow_two(values[4], values[5]),
                      narrow_two(values[6], values[7]));
}

// stream += scale * branch (null: nothing is added), and RMSNorm of what it then holds, with a weight (null: it is in the matrix behind).
//   stream float32 [rows][E]; branch, normed [rows][E]; weight [E]
// Grid (rows / ROWS_OF_CTA), 128 threads.
extern "C" __global__ void __launch_bounds__(128)
add_and_norm(float* stream, const stored* branch, const stored* weight, stored* normed, int rows, float scale, float epsilon)
{
    __shared__ float parts[4];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, place = warp % ROW_WARPS * 32 + lane;
    const long long row = (long long)blockIdx.x * ROWS_OF_CTA + warp / ROW_WARPS;
    float values[HELD_VECTORS][8], sum = 0.f;
#pragma unroll
    for (int i = 0; i < HELD_VECTORS; ++i) {
        const int vector = place + i * 32 * ROW_WARPS;
        if (row >= rows || vector >= VECTORS)
            continue;
        float4* own = (float4*)(stream + row * E) + vector * 2;
        const float4 low = own[0], high = own[1];
        float(&x)[8] = values[i];
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
        if (branch) {
            float added[8];
            unpack(((const uint4*)(branch + row * E))[vector], added);
#pragma unroll
            for (int k = 0; k < 8; ++k)
                x[k] += scale * added[k];
            own[0] = make_float4(x[0], x[1], x[2], x[3]);
            own[1] = make_float4(x[4], x[5], x[6], x[7]);
        }
#pragma unroll
        for (int k = 0; k < 8; ++k)
            sum += x[k] * x[k];
    }
    sum = sum_lanes(sum, 1, 32);
    if (ROW_WARPS > 1) {
        if (lane == 0)
            parts[warp] = sum;
        __syncthreads();
        sum = 0.f;
        for (int i = 0; i < ROW_WARPS; ++i)
            sum += parts[warp / ROW_WARPS * ROW_WARPS + i];
    }
    const float factor = rsqrtf(sum / E + epsilon);
#pragma unroll
    for (int i = 0; i < HELD_VECTORS; ++i) {
        const int vector = place + i * 32 * ROW_WARPS;
        if (row >= rows || vector >= VECTORS)
            continue;
        float by[8];
        if (weight)
            unpack(((const uint4*)weight)[vector], by);
#pragma unroll
        for (int k = 0; k < 8; ++k)
            values[i][k] *= weight ? factor * by[k] : factor;
        ((uint4*)(normed + row * E))[vector] = pack(values[i]);
    }
}

// The inside of a feed-forward layer: the activation, with its gate. inner [rows][(1 + GATED) FF]; out [rows][FF], `inner` itself without a gate.
// Grid (rows, FF / 8 / 128), 128 threads.
extern "C" __global__ void __launch_bounds__(128) activate_inner(const stored* inner, stored* out)
{
    const int vector = blockIdx.y * 128 + threadIdx.x;
    const long long row = blockIdx.x;
    if (vector >= FF / 8)
        return;
    const uint4* from = (const uint4*)(inner + row * ((1 + GATED) * FF)) + vector;
    float values[8], up[8];
    unpack(from[0], values);
    if (GATED)
        unpack(from[FF / 8], up);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        values[k] = activate(values[k]);
        if (GATED)
            values[k] = widen(narrow(values[k])) * up[k];  // rounded twice, as by torch
    }
    ((uint4*)(out + row * FF))[vector] = pack(values);
}

// A product with several matrices of H heads each, [B][S][matrices][H][D], as [matrices][B][H][S][D].
// Grid (S * D / 8 / 256, matrices * H, B), 256 threads.
extern "C" __global__ void __launch_bounds__(256) split_heads(const uint4* from, uint4* to, int length)
{
    constexpr int WIDTH = D / 8;
    const int i = blockIdx.x * 256 + threadIdx.x, part = blockIdx.y, row = blockIdx.z, parts = gridDim.y, batch = gridDim.z;
    if (i >= length * WIDTH)
        return;
    const long long token = (long long)row * length + i / WIDTH, place = ((long long)(part / H) * batch + row) * H + part % H;
    to[place * length * WIDTH + i] = from[(token * parts + part) * WIDTH + i % WIDTH];
}
