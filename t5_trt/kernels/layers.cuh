// The products of a decoder layer, each with what follows it. Grid of all: (output tiles / tiles of a CTA, rows / rows of a CTA); the host
// takes both and shared memory from `geometry` (decode_step.cu).
#pragma once
#include "group_product.cuh"
#include "product_kernel.cuh"
#include "streamed_product.cuh"
#include "tiled_product.cuh"

template <int TOTAL, int OUT_TILES, int OWN_ROW_TILES, int K_TILES, bool NORMED>
using NarrowProduct = Product<TOTAL, OUT_TILES, OWN_ROW_TILES, K_TILES, PRODUCT_WARPS, NORMED>;
// The widest products: tiles of outputs in all and of a CTA, and those that are handed over together if it makes one after the other.
#if STREAMED
template <int TOTAL, int OUT_TILES, int TOGETHER> using WideProduct = StreamedProduct<TOTAL, OUT_TILES, TOGETHER, ROW_TILES, E_K>;
#elif WARPGROUPS
template <int TOTAL, int, int> using WideProduct = GroupProduct<TOTAL, E_K>;
#elif TILED
template <int TOTAL, int OUT_TILES, int> using WideProduct = TiledProduct<TOTAL, OUT_TILES, E_K>;
#else
template <int TOTAL, int OUT_TILES, int> using WideProduct = NarrowProduct<TOTAL, OUT_TILES, ROW_TILES, E_K, true>;
#endif
constexpr int IN_EACH = 1 + GATED;  // tiles of outputs of feed_forward_in for one of its results: gate and up
typedef WideProduct<3 * HD_TILES, QKV_TILES, 2 - QKV_TILES % 2> QkvProduct;
typedef NarrowProduct<E_TILES, ADD_TILES, ADD_ROW_TILES, HD_K, false> AddProduct;
typedef NarrowProduct<HD_TILES, QUERY_TILES, QUERY_ROW_TILES, E_K, true> QueryProduct;
typedef WideProduct<IN_EACH * FF_TILES, IN_EACH * IN_TILES, GATED || IN_TILES % 2 == 0 ? 2 : 1> InProduct;
typedef NarrowProduct<E_TILES, ADD_TILES, ADD_ROW_TILES, FF_K, false> OutProduct;

// Store what a thread has of an output, or of four neighbouring ones.
__device__ __forceinline__ void put(float* to, float value) { *to = value; }
__device__ __forceinline__ void put(float* to, const float4& values) { *(float4*)to = values; }
__device__ __forceinline__ float activated(float first, float second) { return GATED ? activate(first) * second : activate(first); }
#if STORAGE != FLOAT32
__device__ __forceinline__ void put(stored* to, float value) { *to = narrow(value); }
__device__ __forceinline__ void put(stored* to, const float4& values) { *(uint2*)to = {narrow_two(values.x, values.y), narrow_two(values.z, values.w)}; }
#endif
__device__ __forceinline__ void put_activated(stored* to, float first, float second) { *to = narrow(activated(first, second)); }
#if WARPGROUPS
// Of four neighbouring columns two are in each half (`activation_index`).
__device__ __forceinline__ void put_activated(stored* to, const float4& first, const float4& second)
{
    ((unsigned*)to)[0] = narrow_two(activated(first.x, second.x), activated(first.y, second.y));
    ((unsigned*)to)[BLOCK / 8] = narrow_two(activated(first.z, second.z), activated(first.w, second.w));
}
#endif

// q, k and v of the normed stream; k and v go into the cache at each row's position.
//   weights [3 HD][E]; copy of the stream, E_PAD columns; scales, next_scales float32 [rows]; query float32 [rows][HD_PAD];
//   keys, values [rows][H][capacity][D]; position int32 [rows]
extern "C" __global__ void __launch_bounds__(QkvProduct::THREADS, QkvProduct::CTAS)
project_qkv(const uint4* weights, const stored* copy, const float* squares, const float* scales, float* next_scales, float* query,
            stored* keys, stored* values, const int* position, int rows, int capacity, float epsilon)
{
    product<QkvProduct>(weights, copy, {squares, scales, next_scales, epsilon}, rows,
        [&](int, int row) { return row < rows ? position[row] : 0; }, [&](int first, int output, int row, const Outputs<QkvProduct>* y, int place) {
        if (row >= rows)
            return;
        const long long at = ((long long)row * H * capacity + place) * D;
#pragma unroll
        for (int i = 0; i < QkvProduct::TOGETHER; ++i) {
            // each of the three has HD_TILES tiles of its own
            const int which = (first + i) / HD_TILES, column = (first + i) % HD_TILES * 16 + output;
            if (column >= HD || which > 2)
                continue;
            if (which == 0)
                put(query + (long long)row * HD_PAD + column, y[i]);
            else
                put((which == 1 ? keys : values) + at + (long long)(column / D) * capacity * D + column % D, y[i]);
        }
    });
}

// The query of the cross-attention. weights [HD][E]; others as of `project_qkv`.
extern "C" __global__ void __launch_bounds__(QueryProduct::THREADS, 1)
project_query(const uint4* weights, const stored* copy, const float* squares, const float* scales, float* next_scales, float* query, int rows,
              float epsilon)
{
    product<QueryProduct>(weights, copy, {squares, scales, next_scales, epsilon}, rows, Nothing(),
                          [&](int tile0, int output, int row, const float* y, int) {
#pragma unroll
        for (int i = 0; i < QUERY_TILES; ++i)
            if (row < rows && (HD_TILES % QUERY_TILES == 0 || tile0 + i < HD_TILES))
                query[(long long)row * HD_PAD + (tile0 + i) * 16 + output] = y[i];
    });
}

// What the next product reads of the stream's element: the element itself in float32, else its rounded copy, which must stay finite.
__device__ __forceinline__ void leave_copy(stored* copy, int row, int column, float value, float scale)
{
#if STORAGE != FLOAT32
    copy[activation_index(row, column, E_PAD)] = narrow(STORAGE == FLOAT16 ? fminf(fmaxf(value * scale, -65504.f), 65504.f) : value * scale);
#endif
}

// Add a product to the stream, and leave a copy of what it then holds and the sums of its squares.
//   stream float32 [rows][E_PAD]; copy as of `project_qkv`, to be multiplied by `scales` [rows]; squares float32 [rows][PARTIALS]
template <class P>
__device__ __forceinline__ void add_product(const uint4* weights, const stored* x, float* stream, stored* copy, float* squares,
                                            const float* scales, int rows, float factor)
{
    struct Before { float stream[ADD_TILES], scale; };
    const int tile0 = blockIdx.x * ADD_TILES;
    const auto at = [&](int i, int output, int row) { return stream + (long long)row * E_PAD + (tile0 + i) * 16 + output; };
    const auto has = [&](int i, int row) { return row < rows && (E_TILES % ADD_TILES == 0 || tile0 + i < E_TILES); };
    product<P>(weights, x, {}, rows, [&](int output, int row) {
        Before read;
#pragma unroll
        for (int i = 0; i < ADD_TILES; ++i)
            read.stream[i] = has(i, row) ? __ldcg(at(i, output, row)) : 0.f;
        read.scale = row < rows ? __ldcg(scales + row) : 0.f;
        return read;
    }, [&](int, int output, int row, const float* y, const Before& before) {
#pragma unroll
        for (int i = 0; i < ADD_TILES; ++i) {
            const float sum = before.stream[i] + y[i] * factor;
            if (has(i, row)) {
                *at(i, output, row) = sum;
                leave_copy(copy, row, (tile0 + i) * 16 + output, sum, before.scale);
            }
            const float square = sum_lanes(sum * sum, 1, 16);
            if (output == 0 && has(i, row))
                squares[(long long)row * PARTIALS + tile0 + i] = square;
        }
    });
}

// stream += factor * attention's output matrix [E][HD] * attended.
extern "C" __global__ void __launch_bounds__(AddProduct::THREADS, 1)
add_attention(const uint4* weights, const stored* attended, float* stream, stored* copy, float* squares, const float* scales, int rows,
              float factor)
{
    add_product<AddProduct>(weights, attended, stream, copy, squares, scales, rows, factor);
}

// inner = activation(wi * norm(stream)), or activation(wi_0 * ..) * (wi_1 * ..), whose tiles alternate in `weights` [FF or 2 FF][E].
extern "C" __global__ void __launch_bounds__(InProduct::THREADS, InProduct::CTAS)
feed_forward_in(const uint4* weights, const stored* copy, const float* squares, const float* scales, float* next_scales, stored* inner,
                int rows, float epsilon)
{
    product<InProduct>(weights, copy, {squares, scales, next_scales, epsilon}, rows, Nothing(),
                       [&](int first, int output, int row, const Outputs<InProduct>* y, int) {
        if (row >= rows)
            return;
#pragma unroll
        for (int i = 0; i < InProduct::TOGETHER / IN_EACH; ++i) {
            const int tile = first / IN_EACH + i;
            if (tile < FF_TILES)
                put_activated(inner + activation_index(row, tile * 16 + output, FF_PAD), y[IN_EACH * i], y[IN_EACH * i + GATED]);
        }
    });
}

// stream += factor * wo [E][FF] * inner.
extern "C" __global__ void __launch_bounds__(OutProduct::THREADS, 1)
feed_forward_out(const uint4* weights, const stored* inner, float* stream, stored* copy, float* squares, const float* scales, int rows,
                 float factor)
{
    add_product<OutProduct>(weights, inner, stream, copy, squares, scales, rows, factor);
}
