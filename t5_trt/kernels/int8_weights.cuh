// Weights in 8 bits: each is its byte less 128, times a float32 scale of its output. Tensor cores multiply by the numbers without the scale,
// which float16 holds exactly; what a product adds up in float32 is multiplied by the scale at the end.
//
// A tile of 16 outputs: [k tile][lane] 16 bytes, then the scales of the 16 outputs, padded to 128 bytes. A lane has rows g = lane / 4 and g + 8
// of 8 neighbouring columns, whose bytes alternate: bytes 0 and 2 of a word are two columns of row g, bytes 1 and 3 those of row g + 8.
#pragma once
#include "common.cuh"
#include "tensor_cores.cuh"

#if INT8
static_assert(STORAGE == FLOAT16, "8-bit weights go with float16");
constexpr int SCALE_PIECES = 8;  // of 16 bytes, behind each tile of outputs

__device__ __forceinline__ unsigned subtract_two(unsigned pair, unsigned other)
{
    unsigned made;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(made) : "r"(pair), "r"(other));
    return made;
}

// The four numbers of a word as two pairs: below 0x64, a byte b is the half 1024 + b, and 0x6480 is 1152.
__device__ __forceinline__ void widen_word(unsigned word, unsigned& first_row, unsigned& second_row)
{
    first_row = subtract_two(__byte_perm(word, 0x64646464u, 0x4240), 0x64806480u);
    second_row = subtract_two(__byte_perm(word, 0x64646464u, 0x4341), 0x64806480u);
}

// A lane's weights of a k tile as A fragments of two products of 16 columns.
struct Widened
{
    uint4 first, second;
    Widened() = default;
    __device__ __forceinline__ explicit Widened(const uint4& bytes)
    {
        widen_word(bytes.x, first.x, first.y), widen_word(bytes.y, first.z, first.w);
        widen_word(bytes.z, second.x, second.y), widen_word(bytes.w, second.z, second.w);
    }
};

// c[16 outputs][8 rows] += a[16 outputs][32 k] b[32 k][8 rows].
__device__ __forceinline__ void multiply_tiles(float* c, const Widened& a, const uint4& b)
{
    multiply_tiles(c, a.first, uint2{b.x, b.y});
    multiply_tiles(c, a.second, uint2{b.z, b.w});
}
typedef Widened Factor;  // what tensor cores multiply by
#else
constexpr int SCALE_PIECES = 0;
typedef uint4 Factor;
#endif
