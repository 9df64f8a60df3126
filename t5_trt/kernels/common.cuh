// Types, conversions and small device functions that the decoder kernels share.
//
// Compile-time constants (passed as -D by t5_trt/kernels/decode_step.py):
//   STORAGE        0 float16, 1 bfloat16, 2 float32: the type of weights, K/V caches and what a kernel hands to the next
//   E, H, D, FF    d_model, heads, d_kv, inner size of the feed-forward layer
//   V              rows of the output matrix
//   ROW_TILES      tiles of 8 rows that one CTA of a layer serves with one load of the weights (1, 2 or 4)
//   TILED          tiles of outputs of a CTA of the widest products of a layer, by tiled_product.cuh (2 or 4; not in float32); 0: by product.cuh
//   HEAD_ROW_TILES and one of the output matrix (not in float32), HEAD_WARPS of such a CTA
//   GATED, ACTIVATION (0 relu, 1 gelu, 2 gelu_new, 3 silu)
// Sizes of products are padded to multiples of 16 by zeros in the weights and in the activations.
#pragma once
#include "launch.cuh"
#define FLOAT16 0
#define BFLOAT16 1
#define FLOAT32 2

constexpr int HD = H * D;
__host__ __device__ constexpr int tiles(int size) { return (size + 15) / 16; }
constexpr int E_TILES = tiles(E), HD_TILES = tiles(HD), FF_TILES = tiles(FF), V_TILES = tiles(V);
constexpr int E_PAD = E_TILES * 16, HD_PAD = HD_TILES * 16;
constexpr int ROWS = ROW_TILES * 8;               // rows of a CTA
constexpr int PARTIALS = (E_TILES + 15) / 16 * 16;  // partial sums of squares of a row, with zeros behind them

#if STORAGE == FLOAT32
typedef float stored;
#else
typedef unsigned short stored;
#endif

extern __shared__ __align__(16) char shared[];  // of the size that the host gives

__device__ __forceinline__ uint4 load_streaming(const void* from)
{
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from));
    return value;
}

#if STORAGE == FLOAT32
__device__ __forceinline__ float widen(stored value) { return value; }
__device__ __forceinline__ stored narrow(float value) { return value; }
#elif STORAGE == BFLOAT16
__device__ __forceinline__ float widen(stored value) { return __uint_as_float((unsigned)value << 16); }
__device__ __forceinline__ unsigned narrow_two(float low, float high)
{
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ stored narrow(float value) { return (stored)narrow_two(value, 0.f); }
#else
__device__ __forceinline__ float widen(stored value)
{
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}
__device__ __forceinline__ unsigned narrow_two(float low, float high)
{
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ stored narrow(float value) { return (stored)narrow_two(value, 0.f); }
#endif

// Values of one 16-byte load.
constexpr int VECTOR = 16 / sizeof(stored);
__device__ __forceinline__ void unpack(const uint4& loaded, float* values)
{
    const unsigned words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if STORAGE == FLOAT32
        values[i] = __uint_as_float(words[i]);
#else
        values[2 * i] = widen((stored)(words[i] & 0xffff));
        values[2 * i + 1] = widen((stored)(words[i] >> 16));
#endif
    }
}

// Where element `column` of a row lies in the activations of `columns` (a multiple of 16) that a product reads: [row / 8][column / 16]
// [row % 8][column % 16], so that a warp reads the B fragment of 8 rows and 16 columns as 256 neighbouring bytes (`pack_matrix` in weights.py
// says which columns a lane has); plain [row][column] in float32.
__device__ __forceinline__ long long activation_index(int row, int column, int columns)
{
#if STORAGE == FLOAT32
    return (long long)row * columns + column;
#else
    return (((long long)(row >> 3) * (columns >> 4) + (column >> 4)) * 8 + (row & 7)) * 16 + (column & 15);
#endif
}

__device__ __forceinline__ float activate(float x)
{
#if ACTIVATION == 0
    return fmaxf(x, 0.f);
#elif ACTIVATION == 1
    return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
#elif ACTIVATION == 2
    return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
#else
    return x / (1.f + expf(-x));
#endif
}

// Sums over lanes that differ in the bits of [from, to), in a fixed order.
__device__ __forceinline__ float sum_lanes(float value, int from, int to)
{
    for (int step = from; step < to; step <<= 1)
        value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}
