// RMSNorm as a factor of each row: of a product's outputs, whose matrix has the norm's weight in it.
//
// It comes from sums of squares over 16 columns each, [row][PARTIALS], of the float32 stream, and from the power of two by which the stream was
// multiplied before it was rounded to the copy that the product reads.
#pragma once
#include "common.cuh"
#include "types.cuh"

// What a kernel that norms reads of its rows besides x, and the powers of two that it leaves for the next copy of the stream.
struct Norm { const float *squares, *scales; float* next_scales; float epsilon; };

// The power of two by which the stream is multiplied before it is rounded to `stored`: its root mean square, of which `factor` is the
// reciprocal, becomes about 1/8. The next product may then add a hundred thousand times as much without leaving float16's range, and
// what is 1/500 of it still has all of float16's digits. Any power of two gives the same digits.
__device__ __forceinline__ float scale_for(float factor)
{
    return STORAGE == FLOAT32 ? 1.f : fminf(fmaxf(__uint_as_float(__float_as_uint(factor) & 0x7f800000u) * 0.125f, 0x1p-100f), 0x1p100f);
}

// Of a power of two between 2^-126 and 2^126.
__device__ __forceinline__ float reciprocal(float power) { return __uint_as_float(0x7f000000u - __float_as_uint(power)); }

// The factors of a CTA's COUNT rows, by four threads a row. Every CTA reads all sums of squares, which takes as long as reading the rows: so they are asked
// for beside them and, for few rows, added up when the sums of products are there.
template <int THREADS, int COUNT> struct NormFactors {
    static constexpr int LANES_A_ROW = 4, AT_ONCE = THREADS / LANES_A_ROW, ROUNDS = (COUNT + AT_ONCE - 1) / AT_ONCE, LOADS = PARTIALS / 16;
    static constexpr bool EARLY = LOADS <= 8;               // registers hold what was read while the rows are asked for
    static constexpr bool LATE = COUNT == 8 && LOADS <= 4;  // and until the products are made

    const Norm norm;
    const int row0, count;  // the CTA's first row, and how many rows there are from it on
    float4 squares[ROUNDS][EARLY ? LOADS : 1];
    float scales[ROUNDS], made[ROUNDS];

    __device__ __forceinline__ NormFactors(const Norm& own, int first_row, int rows) : norm(own), row0(first_row), count(rows - first_row) {}

    // This thread's row of a round, counted from the CTA's first one.
    static __device__ __forceinline__ int local_of(int round) { return round * AT_ONCE + threadIdx.x / LANES_A_ROW; }
    // Whether this thread's warp has a row.
    static __device__ __forceinline__ bool takes_part(int round) { return COUNT % AT_ONCE == 0 || (local_of(round) & -8) < COUNT; }
    __device__ __forceinline__ bool has(int round) const { return local_of(round) < count; }

    // A part of this thread's sums of squares.
    __device__ __forceinline__ float4 part(int round, int i) const
    {
        const float4* from = (const float4*)(norm.squares + (long long)(row0 + local_of(round)) * PARTIALS) + threadIdx.x % LANES_A_ROW;
        return has(round) ? load_in_order(from + i * LANES_A_ROW) : float4{};
    }

    // Start to read.
    __device__ __forceinline__ void load()
    {
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            if (!takes_part(round))
                break;
            scales[round] = has(round) ? load_in_order(norm.scales + row0 + local_of(round)) : 1.f;
            if constexpr (EARLY)
#pragma unroll
                for (int i = 0; i < LOADS; ++i)
                    squares[round][i] = part(round, i);
        }
    }

    // Leave the factors for a barrier that follows.
    __device__ __forceinline__ void leave(float* factors)
    {
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            if (!takes_part(round))
                break;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const float4 four = EARLY ? squares[round][EARLY ? i : 0] : part(round, i);
                sum += (four.x + four.y) + (four.z + four.w);
            }
            made[round] = rsqrtf(sum_lanes(sum, 1, LANES_A_ROW) * (1.f / E) + norm.epsilon);
            if (threadIdx.x % LANES_A_ROW == 0)
                factors[local_of(round)] = made[round] * reciprocal(scales[round]);
        }
    }

    // After `leave`: leave the powers of two for the next copy of the stream, by the first of the CTAs that have these rows.
    __device__ __forceinline__ void leave_scales() const
    {
        if (blockIdx.x != 0 || !norm.next_scales)
            return;
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round)
            if (takes_part(round) && has(round) && threadIdx.x % LANES_A_ROW == 0)
                norm.next_scales[row0 + local_of(round)] = scale_for(made[round]);
    }
};
