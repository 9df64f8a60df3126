// What every kernel of this package may need: early starts, an order of floats, and operations of a warp.
#pragma once

// Programmatic dependent launch (sm_90 and newer): `wait_for_inputs` returns once the kernel before has ended and its writes are
// visible. What is read before it must be older than this launch of the CUDA graph: weights, and keys and values of earlier steps.
__device__ inline void let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_inputs()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

// An unsigned form of a float with the same order, in which -0 counts as 0; and the float again. No number gives 0.
__device__ inline unsigned sortable(float value)
{
    const unsigned bits = __float_as_uint(value + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_sortable(unsigned key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// Threads that work together without a barrier; tests on a CPU, which has one thread, set it to 1.
#ifndef LANES
#define LANES 32
#endif
__device__ inline unsigned lanes_max(unsigned value) { return __reduce_max_sync(0xffffffffu, value); }
__device__ inline unsigned lanes_min(unsigned value) { return __reduce_min_sync(0xffffffffu, value); }
// The lowest `id` among the lanes that have `key`.
__device__ inline unsigned lowest_with(unsigned key, unsigned own_key, unsigned id) { return lanes_min(own_key == key ? id : 0xffffffffu); }

// Leave a report of `width` entries in the host's memory, by all threads of a block: `mails` places of a stamp and a report each. The host
// looks for the stamp, which is written last.
__device__ inline void send_report(long long* memory, const long long* epoch, const volatile long long* report, int width, int mails, long long place)
{
    if (!memory)
        return;
    volatile long long* mail = memory + place % mails * (1 + width);
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        mail[1 + i] = report[i];
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0)
        mail[0] = (epoch[0] << 32) + place;
}
