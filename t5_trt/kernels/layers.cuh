// The products of a decoder layer, each with what follows it. Grid of all: (output tiles of a CTA, groups of ROWS rows).
#pragma once
#include "product.cuh"

#ifndef SMALL_WARPS
#define SMALL_WARPS 8
#endif
#ifndef LARGE_WARPS
#define LARGE_WARPS 16
#endif
// Tiles of outputs that a CTA makes: with many rows, two for one reading of the stream.
#ifndef WIDE
#define WIDE (ROW_TILES >= 4 && STORAGE != FLOAT32 ? 2 : 1)
#endif
__host__ __device__ constexpr int warps_for(int k_tiles) { return k_tiles <= 64 ? SMALL_WARPS : LARGE_WARPS; }

// q, k and v of the normed stream; k and v go into the cache at each row's position.
//   weights [3 HD][E]; stream float32 [rows][E_PAD]; query float32 [rows][HD_PAD]; cache [rows][H][capacity][D] each; position int32 [rows]
extern "C" __global__ void __launch_bounds__(warps_for(E_TILES) * 32, 1)
project_qkv(const uint4* weights, const float* stream, const float* squares, float* query, stored* keys, stored* values,
            const int* position, int rows, int capacity, float epsilon)
{
    product<WIDE, E_TILES, warps_for(E_TILES), true>(weights, stream, squares, rows, epsilon,
        [&](int, int row) { return row < rows ? position[row] : 0; }, [&](int output, int row, const float* y, int place) {
        if (row >= rows)
            return;
#pragma unroll
        for (int i = 0; i < WIDE; ++i) {
            // each of the three has HD_TILES tiles of its own
            const int tile = blockIdx.x * WIDE + i, which = tile / HD_TILES, column = (tile % HD_TILES) * 16 + output;
            if (column >= HD || which > 2)
                continue;
            if (which == 0)
                query[(long long)row * HD_PAD + column] = y[i];
            else
                (which == 1 ? keys : values)[(((long long)row * H + column / D) * capacity + place) * D + column % D] = narrow(y[i]);
        }
    });
}

// The query of the cross-attention. weights [HD][E]; others as of `project_qkv`.
extern "C" __global__ void __launch_bounds__(warps_for(E_TILES) * 32, 1)
project_query(const uint4* weights, const float* stream, const float* squares, float* query, int rows, float epsilon)
{
    const int tile = blockIdx.x;
    product<1, E_TILES, warps_for(E_TILES), true>(weights, stream, squares, rows, epsilon, Nothing(), [&](int output, int row, const float* y, int) {
        if (row < rows)
            query[(long long)row * HD_PAD + tile * 16 + output] = y[0];
    });
}

// Add a product to the stream, and leave the sums of squares of what the stream then holds.
template <int K_TILES>
__device__ __forceinline__ void add_product(const uint4* weights, const void* x, float* stream, float* squares, int rows, float scale)
{
    const int tile = blockIdx.x;
    const auto at = [&](int output, int row) { return stream + (long long)row * E_PAD + tile * 16 + output; };
    product<1, K_TILES, warps_for(K_TILES), false>(weights, x, nullptr, rows, 0.f, [&](int output, int row) { return row < rows ? __ldcg(at(output, row)) : 0.f; },
        [&](int output, int row, const float* y, float before) {
        const float sum = before + y[0] * scale;
        if (row < rows)
            *at(output, row) = sum;
        const float square = sum_lanes(sum * sum, 1, 16);
        if (output == 0 && row < rows)
            squares[(long long)row * PARTIALS + tile] = square;
    });
}

// stream += scale * attention's output matrix [E][HD] * attended.
extern "C" __global__ void __launch_bounds__(warps_for(HD_TILES) * 32)
add_attention(const uint4* weights, const stored* attended, float* stream, float* squares, int rows, float scale)
{
    add_product<HD_TILES>(weights, attended, stream, squares, rows, scale);
}

// inner = activation(wi * norm(stream)), or activation(wi_0 * ..) * (wi_1 * ..), whose tiles alternate in `weights` [FF or 2 FF][E].
extern "C" __global__ void __launch_bounds__(warps_for(E_TILES) * 32, 1)
feed_forward_in(const uint4* weights, const float* stream, const float* squares, stored* inner, int rows, float epsilon)
{
    constexpr int OUT_TILES = GATED ? 2 : WIDE;
    product<OUT_TILES, E_TILES, warps_for(E_TILES), true>(weights, stream, squares, rows, epsilon, Nothing(), [&](int output, int row, const float* y, int) {
        if (row >= rows)
            return;
#pragma unroll
        for (int i = 0; i < OUT_TILES / (1 + GATED); ++i) {
            const int tile = blockIdx.x * OUT_TILES / (1 + GATED) + i;
            const float value = GATED ? activate(y[0]) * y[GATED] : activate(y[i]);
            if (tile < FF_TILES)
                inner[activation_index(row, tile * 16 + output, FF_TILES * 16)] = narrow(value);
        }
    });
}

// stream += scale * wo [E][FF] * inner.
extern "C" __global__ void __launch_bounds__(warps_for(FF_TILES) * 32)
feed_forward_out(const uint4* weights, const stored* inner, float* stream, float* squares, int rows, float scale)
{
    add_product<FF_TILES>(weights, inner, stream, squares, rows, scale);
}
