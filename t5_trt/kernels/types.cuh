// The type that weights and activations are stored in, and small device functions of all kernels that compute with them.
//
// Compile-time constants: STORAGE (0 float16, 1 bfloat16, 2 float32) and ACTIVATION (0 relu, 1 gelu, 2 gelu_new, 3 silu).
#pragma once
#define FLOAT16 0
#define BFLOAT16 1
#define FLOAT32 2

#if STORAGE == FLOAT32
typedef float stored;
#else
typedef unsigned short stored;
#endif

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
