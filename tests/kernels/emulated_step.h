// What the decoder's kernels need beside emulated_warp.h.
#pragma once
#include "emulated_warp.h"

#define __host__
#define shared attention_memory
template <class T> static T __ldcg(const T* from) { return *from; }
static uint4 load_streaming(const void* from)
{
    if ((uintptr_t)from % 16)
        fprintf(stderr, "a load is not aligned\n"), abort();
    return *(const uint4*)from;
}
static void prefetch(const void*) {}
static void let_next_start() {}
static void wait_for_inputs() {}
static unsigned sortable(float value)
{
    const unsigned bits = __float_as_uint(value + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
static unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, int step)
{
    const unsigned low = __float_as_uint(__shfl_xor_sync(mask, __uint_as_float(value), step));
    return (unsigned long long)__float_as_uint(__shfl_xor_sync(mask, __uint_as_float(value >> 32), step)) << 32 | low;
}
static void atomicMax(unsigned long long* at, unsigned long long value) { *at = std::max(*at, value); }
static unsigned __byte_perm(unsigned x, unsigned y, unsigned selector)
{
    const unsigned long long all = (unsigned long long)y << 32 | x;
    unsigned made = 0;
    for (int i = 0; i < 4; ++i)
        made |= (unsigned)(all >> ((selector >> 4 * i & 7) * 8) & 0xff) << 8 * i;
    return made;
}
static unsigned subtract_two(unsigned pair, unsigned other)
{
    return narrow(widen(pair) - widen(other)) | (unsigned)narrow(widen(pair >> 16) - widen(other >> 16)) << 16;
}
