// The products of a decoder layer, each with what follows it. Grid of all: (output tiles / tiles of a CTA, rows / rows of a CTA); the host
// takes both and shared memory from `geometry` (decode_step.cu).
#pragma once
#include "group_product.cuh"
#include "product_kernel.cuh"
#include "split_product.cuh"
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
typedef WideProduct<3 * HD_TILES, QKV_TILES, QKV_TOGETHER> QkvProduct;
#if ADD_SPLIT
typedef SplitProduct<E_TILES, ADD_SPLIT, SPLIT_ROW_TILES, HD_K> AddProduct;
#define ADD_CLUSTER __cluster_dims__(CLUSTER)
#else
typedef NarrowProduct<E_TILES, ADD_TILES, ADD_ROW_TILES, HD_K, false> AddProduct;
#define ADD_CLUSTER
#endif
typedef NarrowProduct<HD_TILES, QUERY_TILES, QUERY_ROW_TILES, E_K, true> QueryProduct;
typedef WideProduct<IN_EACH * FF_TILES, IN_EACH * IN_TILES, IN_EACH * IN_TOGETHER> InProduct;
#if OUT_SPLIT
typedef SplitProduct<E_TILES, OUT_SPLIT, SPLIT_ROW_TILES, FF_K> OutProduct;
#define OUT_CLUSTER __cluster_dims__(CLUSTER)
#else
typedef NarrowProduct<E_TILES, ADD_TILES, ADD_ROW_TILES, FF_K, false> OutProduct;
#define OUT_CLUSTER
#endif

// Store what a thread has of an output, or of four neighbouring ones.
__device__ __forceinline__ void put(stored* to, float value) { *to = narrow(value); }
#if STORAGE != FLOAT32
__device__ __forceinline__ void put(stored* to, const float4& values) { *(uint2*)to = {narrow_two(values.x, values.y), narrow_two(values.z, values.w)}; }
#endif
__device__ __forceinline__ float activated(float first, float second) { return GATED ? activate(first) * second : activate(first); }
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
//   weights [3 HD][E]; copy of the stream, E_PAD columns; scales, next_scales float32 [rows]; query float32 [rows][HD_PAD], stored
//   by `put_query`; keys, values [rows][H][capacity][D]; position int32 [rows]
extern "C" __global__ void __launch_bounds__(QkvProduct::THREADS, QkvProduct::CTAS)
project_qkv(const uint4* weights, const stored* copy, const float* squares, const float* scales, float* next_scales, float* query,
            stored* keys, stored* values, const int* position, int rows, int capacity, float epsilon)
{
    product<QkvProduct, 1>(weights, copy, {squares, scales, next_scales, epsilon}, rows,
        [&](int, int row) { return row < rows ? position[row] : 0; }, [&](int first, int output, int row, const Outputs<QkvProduct>* y, int place) {
        if (row >= rows)
            return;
        const long long at = ((long long)row * H * capacity + place) * D;
        constexpr int HANDED = Teams<QkvProduct, 1>::HANDED;
#pragma unroll
        for (int i = 0; i < HANDED; ++i) {
            // each of the three has HD_TILES tiles of its own
            const int which = (first + i) / HD_TILES, column = (first + i) % HD_TILES * 16 + output;
            if (column >= HD || which > 2)
                continue;
            if (which == 0)
                put_query(query + (long long)row * HD_PAD, column, y[i]);
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
    product<QueryProduct, QUERY_TILES>(weights, copy, {squares, scales, next_scales, epsilon}, rows, Nothing(),
                          [&](int tile0, int output, int row, const float* y, int) {
#pragma unroll
        for (int i = 0; i < QUERY_TILES; ++i)
            if (row < rows && (HD_TILES % QUERY_TILES == 0 || tile0 + i < HD_TILES))
                put_query(query + (long long)row * HD_PAD, (tile0 + i) * 16 + output, y[i]);
    });
}

// What the next product reads of the stream's element: the element itself in float32, else its rounded copy, which must stay finite.
__device__ __forceinline__ void leave_copy(stored* copy, int row, int column, float value, float scale)
{
#if STORAGE != FLOAT32
    copy[activation_index(row, column, E_PAD)] = narrow(STORAGE == FLOAT16 ? fminf(fmaxf(value * scale, -65504.f), 65504.f) : value * scale);
#endif
}

// What products that add are given: stream float32 [rows][E_PAD]; copy as of `project_qkv`, to be multiplied by `scales` [rows]; squares float32
// [rows][PARTIALS]; a factor.
struct Stream { float* stream; stored* copy; float* squares; const float* scales; int rows; float factor; };

// An element of the stream before a product is added: a thread's for an output of a tile and a row.
struct Element { float value, scale; };
__device__ __forceinline__ Element element(const Stream& to, int tile, int output, int row)
{
    const bool there = row < to.rows && tile < E_TILES;
    return {there ? __ldcg(to.stream + (long long)row * E_PAD + tile * 16 + output) : 0.f, row < to.rows ? __ldcg(to.scales + row) : 0.f};
}
// Add to it, and leave a copy of what it then is and the sum of the squares of a tile's 16 outputs, which neighbouring threads have.
__device__ __forceinline__ void add_to(const Stream& to, int tile, int output, int row, const Element& before, float made)
{
    const float sum = before.value + made * to.factor;
    const bool there = row < to.rows && tile < E_TILES;
    if (there) {
        to.stream[(long long)row * E_PAD + tile * 16 + output] = sum;
        leave_copy(to.copy, row, tile * 16 + output, sum, before.scale);
    }
    const float square = sum_lanes(sum * sum, 1, 16);
    if (output == 0 && there)
        to.squares[(long long)row * PARTIALS + tile] = square;
}

template <class P> __device__ __forceinline__ void add_whole(const uint4* weights, const stored* x, const Stream& to)
{
    struct Before { Element tile[P::TILES]; };
    product<P, P::TILES>(weights, x, {}, to.rows, [&](int output, int row) {
        Before read;
#pragma unroll
        for (int i = 0; i < P::TILES; ++i)
            read.tile[i] = element(to, blockIdx.x * P::TILES + i, output, row);
        return read;
    }, [&](int first, int output, int row, const float* y, const Before& before) {
#pragma unroll
        for (int i = 0; i < P::TILES; ++i)
            add_to(to, first + i, output, row, before.tile[i], y[i]);
    });
}

#if ADD_SPLIT || OUT_SPLIT
// Elements that a thread of a cluster's CTA adds to at most. For each: call of(round, tile, row), both counted from the CTA's first one, by whole
// warps, so that there may be a tile more than the CTA has.
template <class P> constexpr int ROUNDS = (P::SENT + P::THREADS - 1) / P::THREADS;
template <class P, class Of> __device__ __forceinline__ void each_element(Of of)
{
    constexpr int COUNT = ROUNDS<P>, IN_WARPS = (P::SENT + 31) / 32 * 32;
#pragma unroll
    for (int round = 0; round < COUNT; ++round) {
        const int i = round * P::THREADS + threadIdx.x;
        if (P::SENT % P::THREADS == 0 || i < IN_WARPS)
            of(round, i / 16 / P::HANDED, i / 16 % P::HANDED);
    }
}

// The same by a cluster.
template <class P> __device__ __forceinline__ void add_split(const uint4* weights, const stored* x, const Stream& to)
{
    const int cta = blockIdx.x % CLUSTER, tile0 = blockIdx.x / CLUSTER * P::TILES, row0 = blockIdx.y * P::OWN_ROWS, output = threadIdx.x % 16;
    const int handed0 = row0 + cta * P::HANDED;
    const auto tile_at = [&](int tile) { return tile < P::TILES ? tile0 + tile : E_TILES; };
    Element before[ROUNDS<P>];
    float output_scales[ROUNDS<P>];
    P work(weights, tile0, cta);
    let_next_start();
    wait_for_inputs();
    each_element<P>([&](int round, int tile, int row) {
        before[round] = element(to, tile_at(tile), output, handed0 + row);
        output_scales[round] = INT8 ? ((const float*)weights_at<P::INPUTS>(weights, min(tile_at(tile), E_TILES - 1), P::INPUTS))[output] : 1.f;
    });
    work.begin(x, row0, to.rows);
    work.run(x, row0, to.rows);
    each_element<P>([&](int round, int tile, int row) {
        add_to(to, tile_at(tile), output, handed0 + row, before[round], P::total(tile, output, row) * output_scales[round]);
    });
}
#endif

template <class P> __device__ __forceinline__ void add_product(const uint4* weights, const stored* x, const Stream& to)
{
#if ADD_SPLIT || OUT_SPLIT
    if constexpr (P::CLUSTER_CTAS > 1)
        return add_split<P>(weights, x, to);
    else
#endif
        add_whole<P>(weights, x, to);
}

// stream += factor * attention's output matrix [E][HD] * attended.
extern "C" __global__ void ADD_CLUSTER __launch_bounds__(AddProduct::THREADS, 1)
add_attention(const uint4* weights, const stored* attended, float* stream, stored* copy, float* squares, const float* scales, int rows,
              float factor)
{
    add_product<AddProduct>(weights, attended, {stream, copy, squares, scales, rows, factor});
}

// inner = activation(wi * norm(stream)), or activation(wi_0 * ..) * (wi_1 * ..), whose tiles alternate in `weights` [FF or 2 FF][E].
extern "C" __global__ void __launch_bounds__(InProduct::THREADS, InProduct::CTAS)
feed_forward_in(const uint4* weights, const stored* copy, const float* squares, const float* scales, float* next_scales, stored* inner,
                int rows, float epsilon)
{
    product<InProduct, IN_EACH>(weights, copy, {squares, scales, next_scales, epsilon}, rows, Nothing(),
                       [&](int first, int output, int row, const Outputs<InProduct>* y, int) {
        if (row >= rows)
            return;
        constexpr int HANDED = Teams<InProduct, IN_EACH>::HANDED / IN_EACH;
#pragma unroll
        for (int i = 0; i < HANDED; ++i) {
            const int tile = first / IN_EACH + i;
            if (tile < FF_TILES)
                put_activated(inner + activation_index(row, tile * 16 + output, FF_PAD), y[IN_EACH * i], y[IN_EACH * i + GATED]);
        }
    });
}

// stream += factor * wo [E][FF] * inner.
extern "C" __global__ void OUT_CLUSTER __launch_bounds__(OutProduct::THREADS, 1)
feed_forward_out(const uint4* weights, const stored* inner, float* stream, stored* copy, float* squares, const float* scales, int rows,
                 float factor)
{
    add_product<OutProduct>(weights, inner, {stream, copy, squares, scales, rows, factor});
}
