// Products by a warp group (wgmma, sm_90a): four warps, each with a tile of 16 outputs of its own in registers, multiply by the same rows in shared
// memory, which are read once for all four. They run beside what the warps do meanwhile, until these wait for them.
//
// A k tile of 8 rows is [half][row] 16 bytes, as `activation_index` puts it: two "core matrices" without swizzle (PTX ISA, "Shared Memory Matrix
// Layout" of wgmma).
#pragma once
#include "tensor_cores.cuh"

#if WARPGROUPS
#if STORAGE == BFLOAT16
#define GROUP_TYPES "f32.bf16.bf16"
#else
#define GROUP_TYPES "f32.f16.f16"
#endif

// Must stand before the products that follow a change of their registers.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the end before are one group.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most LATER groups are under way, and hand over what the others have made: COUNT sums from `made` on.
template <int LATER, int COUNT> __device__ __forceinline__ void wait_for_products(float* made)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        asm volatile("" : "+f"(made[i])::"memory");  // not read before the wait
}
// What the thread has copied into shared memory is there for products once all threads have met at a barrier.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What products are told of rows in shared memory: where a k tile begins, in units of 16 bytes, 128 bytes between its halves, and `stride` bytes
// between tiles of 8 rows.
__device__ __forceinline__ unsigned long long describe_rows(const char* at, int stride)
{
    const unsigned address = (unsigned)__cvta_generic_to_shared(at) & 0x3ffff;  // in a cluster the bits above say which CTA's memory it is
    return (unsigned long long)(address >> 4) | (unsigned long long)(128 >> 4) << 16 | (unsigned long long)(stride >> 4) << 32;
}

#define SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
// sums[16 outputs of the warp][ROW_COUNT rows] = a[16 outputs][16 k] b[16 k][rows], plus themselves with ADDS: of each 8 rows an accumulator of
// mma.m16n8k16. Neither `sums` nor `a` may be touched before a wait.
template <int ROW_COUNT, bool ADDS> __device__ __forceinline__ void multiply_group(float* sums, const uint4& a, unsigned long long rows)
{
    static_assert(ROW_COUNT == 32 || ROW_COUNT == 64 || ROW_COUNT == 128, "rows of a product");
    if constexpr (ROW_COUNT == 32)
        asm volatile("{.reg .pred adds; setp.ne.b32 adds, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16." GROUP_TYPES
                     " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},"
                     "{%16,%17,%18,%19},%20,adds,1,1,0;}"
                     : SUMS_16(0) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(rows), "n"(ADDS));
    if constexpr (ROW_COUNT == 64)
        asm volatile("{.reg .pred adds; setp.ne.b32 adds, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16." GROUP_TYPES
                     " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
                     "{%32,%33,%34,%35},%36,adds,1,1,0;}"
                     : SUMS_16(0), SUMS_16(16) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(rows), "n"(ADDS));
    if constexpr (ROW_COUNT == 128)
        asm volatile("{.reg .pred adds; setp.ne.b32 adds, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16." GROUP_TYPES
                     " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,"
                     "%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
                     "{%64,%65,%66,%67},%68,adds,1,1,0;}"
                     : SUMS_16(0), SUMS_16(16), SUMS_16(32), SUMS_16(48) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(rows), "n"(ADDS));
}
#endif
