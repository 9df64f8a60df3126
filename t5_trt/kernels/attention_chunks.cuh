// What both forms of attention share: chunks of keys, and how the sums of several chunks of a row are added up.
#pragma once
#include "common.cuh"

constexpr int CHUNK = 128;            // keys of a CTA
constexpr float HIDDEN = -3.0e38f;    // a score below all others
constexpr int PART = D + 2;           // what a chunk knows: the largest score, the sum of exponentials, the weighted sum of values [D]
constexpr unsigned KEY_BYTES = D * sizeof(stored);

__device__ __forceinline__ float exp2_fast(float x)
{
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// `base` and `count` times `size` bytes, by a product of 32 bits each: the compiler takes 64.
__device__ __forceinline__ const char* further(const char* base, unsigned count, unsigned size)
{
    const char* there;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(there) : "r"(count), "r"(size), "l"(base));
    return there;
}

// Where the parts of a row and head begin: parts [rows][H][chunks][PART].
__device__ __forceinline__ float* parts_of(float* parts, int row) { return parts + ((long long)row * H + blockIdx.x) * gridDim.z * PART; }

// Count the CTAs that have left their part of a head for `rows` rows from `row` on; the last one adds the parts up.
template <int THREADS>
__device__ __forceinline__ void add_chunks(float* parts, int chunks, int row, int rows, stored* attended, int* arrived)
{
    __shared__ int is_last;
    int* counter = arrived + row * H + blockIdx.x;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(counter, 1) == chunks - 1;
        if (is_last)
            *counter = 0;
    }
    __syncthreads();
    if (!is_last)
        return;
    __threadfence();
    for (int i = threadIdx.x; i < rows * D; i += THREADS) {
        const int own = row + i / D, column = i % D;
        const float* from = parts_of(parts, own);
        float most = HIDDEN, value = 0.f, weights = 0.f;
        for (int c = 0; c < chunks; ++c)
            most = fmaxf(most, __ldcg(from + c * PART));
#pragma unroll 4
        for (int c = 0; c < chunks; ++c) {
            const float factor = exp2_fast(__ldcg(from + c * PART) - most);
            weights = fmaf(__ldcg(from + c * PART + 1), factor, weights);
            value = fmaf(__ldcg(from + c * PART + 2 + column), factor, value);
        }
        attended[activation_index(own, blockIdx.x * D + column, HD_PAD)] = narrow(value / weights);
    }
}
