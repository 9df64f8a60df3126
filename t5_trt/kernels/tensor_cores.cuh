// Products of small tiles on the tensor cores, and copies into shared memory that nobody waits for at once.
#pragma once
#include "types.cuh"

#if STORAGE != FLOAT32
// c[16 outputs][8 rows] += a[16 outputs][16 k] b[16 k][8 rows], on the tensor cores.
__device__ __forceinline__ void multiply_tiles(float* c, const uint4& a, const uint2& b)
{
#if STORAGE == BFLOAT16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
#endif

// Copy 16 bytes into shared memory without waiting for them; zeros where `there` is false.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, bool there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// Copy 4 bytes likewise.
__device__ __forceinline__ void copy_word_async(unsigned to, const void* from, bool there)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATER> __device__ __forceinline__ void wait_for_group() { asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory"); }
