// Types, conversions and small device functions that the decoder kernels share.
//
// Compile-time constants (passed as -D by t5_trt/kernels/decode_step.py):
//   STORAGE        0 float16, 1 bfloat16, 2 float32: the type of weights, K/V caches and what a kernel hands to the next
//   E, H, D, FF    d_model, heads, d_kv, inner size of the feed-forward layer
//   V              rows of the output matrix
//   ROW_TILES      tiles of 8 rows that one CTA of a layer's products serves with one load of the weights (1, 2 or 4); ADD_ROW_TILES likewise of
//                  those that add to the stream, QUERY_ROW_TILES of project_query
//   QKV_TILES, IN_TILES  tiles of 16 outputs of a CTA of project_qkv and feed_forward_in (gate and up count as one), the widest products of a
//                  layer: made by streamed_product.cuh if STREAMED, by group_product.cuh if WARPGROUPS or by tiled_product.cuh if TILED (none of
//                  them in float32), else by product.cuh.
//                  QKV_TOGETHER, IN_TOGETHER: those of them that streamed_product.cuh makes at the same time. QUERY_TILES of project_query, ADD_TILES of
//                  those that add
//   ADD_SPLIT, OUT_SPLIT  0, or tiles of 16 outputs of a CTA of add_attention and feed_forward_out, which are then made by split_product.cuh:
//                  SPLIT_CTAS CTAs share k, for SPLIT_ROW_TILES row tiles
//   HEAD_ROW_TILES row tiles of a CTA of the output matrix (not in float32), HEAD_WARPS of it, HEAD_ROOM bytes of shared memory for its rows;
//                  HEAD_ASKS: weights are asked for ahead of their loads
//   WARPGROUPS     0, or tiles of 8 rows of a CTA of group_product.cuh; then the output matrix is multiplied by warp groups, too
//   GATED, ACTIVATION (0 relu, 1 gelu, 2 gelu_new, 3 silu)
//   INT8           1: matrices are in 8 bits (int8_weights.cuh), everything else in half precision; absent in all other cases
// Sizes of products are padded by zeros in the weights and in the activations: to multiples of 16, with INT8 of 32.
#pragma once
#include "launch.cuh"
#include "types.cuh"

#ifndef INT8
#define INT8 0
#endif
#ifndef WARPGROUPS
#define WARPGROUPS 0
#endif

constexpr int HD = H * D;
constexpr int K_BITS = INT8 ? 5 : 4, K_TILE = 1 << K_BITS;  // columns of a k tile: what a lane multiplies after one load of weights
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int tiles(int size) { return (size + 15) / 16; }
__host__ __device__ constexpr int k_tiles(int size) { return (size + K_TILE - 1) / K_TILE; }
constexpr int E_K = k_tiles(E), HD_K = k_tiles(HD), FF_K = k_tiles(FF), V_TILES = tiles(V);  // as inputs: k tiles; as outputs: tiles of 16
constexpr int E_PAD = E_K * K_TILE, HD_PAD = HD_K * K_TILE, FF_PAD = FF_K * K_TILE;
constexpr int E_TILES = E_PAD / 16, HD_TILES = HD_PAD / 16, FF_TILES = FF_PAD / 16;
constexpr int ROWS = ROW_TILES * 8;               // rows of a CTA
constexpr int PARTIALS = (E_TILES + 15) / 16 * 16;  // partial sums of squares of a row, with zeros behind them

// Whether attention is made by the tensor cores (tile_attention.cuh), else by attention.cuh.
#define TILE_ATTENTION (STORAGE != FLOAT32 && (D == 64 || D == 128))
constexpr float LOG2E = 1.4426950408889634f;

extern __shared__ __align__(16) char shared[];  // of the size that the host gives

// 16 bytes of weights, which are read once. The compiler may move such a load over everything.
__device__ __forceinline__ uint4 load_streaming(const void* from)
{
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from));
    return value;
}
// Likewise, but it stays before a wait that follows.
__device__ __forceinline__ uint4 load_before_wait(const void* from)
{
    uint4 value;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from));
    return value;
}

// Loads of what kernels before have written, which the compiler must not delay: it puts them all behind the products of a round.
__device__ __forceinline__ float load_in_order(const float* from)
{
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
}
__device__ __forceinline__ float4 load_in_order(const float4* from)
{
    float4 value;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "l"(from));
    return value;
}
__device__ __forceinline__ uint2 load_in_order(const uint2* from)
{
    uint2 value;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
    return value;
}
__device__ __forceinline__ uint4 load_in_order(const uint4* from)
{
    uint4 value;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from));
    return value;
}

// Where element `column` of a row lies in the activations of `columns` (a multiple of K_TILE) that a product reads: [row / 8][column / K_TILE]
// [row % 8][column % K_TILE], so that a warp reads the B fragments of 8 rows and a k tile as neighbouring bytes (`pack_matrix` in weights.py
// says which columns a lane has); plain [row][column] in float32. With WARPGROUPS a row tile's 16 columns are [half][row % 8][8], where a half has
// every other pair of columns: what a warp group multiplies by lies together, and a lane's fragments are two words.
__device__ __forceinline__ long long activation_index(int row, int column, int columns)
{
#if STORAGE == FLOAT32
    return (long long)row * columns + column;
#elif WARPGROUPS
    return ((((long long)(row >> 3) * (columns >> 4) + (column >> 4)) * 2 + (column >> 1 & 1)) * 8 + (row & 7)) * 8 + (column >> 2 & 3) * 2 + (column & 1);
#else
    return (((long long)(row >> 3) * (columns >> K_BITS) + (column >> K_BITS)) * 8 + (row & 7)) * K_TILE + (column & (K_TILE - 1));
#endif
}

// Store a query's element, or four neighbouring ones, where `query` is a row. With TILE_ATTENTION there are, of every eight columns, LOG2E times the
// elements as `stored`, and behind these what is lost by that, also as `stored`; both stay finite in float16. Otherwise the elements in float32.
#if TILE_ATTENTION
__device__ __forceinline__ float finite(float x) { return STORAGE == FLOAT16 ? fminf(fmaxf(x, -65504.f), 65504.f) : x; }
__device__ __forceinline__ float rest_of(float x) { return finite(x - widen(narrow(finite(x)))); }
__device__ __forceinline__ stored* query_place(float* query, int column) { return (stored*)(query + column / 8 * 8) + column % 8; }
__device__ __forceinline__ void put_query(float* query, int column, float value)
{
    stored* to = query_place(query, column);
    value *= LOG2E;
    to[0] = narrow(finite(value)), to[8] = narrow(rest_of(value));
}
__device__ __forceinline__ void put_query(float* query, int column, const float4& values)
{
    uint2* to = (uint2*)query_place(query, column);
    const float4 own = {LOG2E * values.x, LOG2E * values.y, LOG2E * values.z, LOG2E * values.w};
    to[0] = {narrow_two(finite(own.x), finite(own.y)), narrow_two(finite(own.z), finite(own.w))};
    to[2] = {narrow_two(rest_of(own.x), rest_of(own.y)), narrow_two(rest_of(own.z), rest_of(own.w))};
}
#else
__device__ __forceinline__ void put_query(float* query, int column, float value) { query[column] = value; }
__device__ __forceinline__ void put_query(float* query, int column, const float4& values) { *(float4*)(query + column) = values; }
#endif
