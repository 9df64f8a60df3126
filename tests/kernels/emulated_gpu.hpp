// Enough of CUDA to run a kernel's threads on a CPU as they run on a GPU: coroutines that wait for one another at shuffles and barriers.
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __launch_bounds__(...)
#define __forceinline__ inline
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __threadfence()
#define __threadfence_system()
#define __syncwarp()
#define __CUDA_ARCH__ 800
struct float2 { float x, y; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };
static dim3 blockIdx, blockDim, gridDim;

struct Thread { ucontext_t context; unsigned index, shuffles; bool done; std::vector<char> stack; };
static std::vector<Thread> threads(256);
static Thread* current;
static ucontext_t scheduler;
#define threadIdx (dim3{current->index, 0, 0})

struct Barrier {
    unsigned arrived, generation;
    void wait(unsigned members)
    {
        const unsigned mine = generation;
        if (++arrived == members)
            arrived = 0, ++generation;
        while (generation == mine)
            swapcontext(&current->context, &scheduler);
    }
};
static Barrier of_block, of_warp[8];
static void __syncthreads() { of_block.wait(blockDim.x); }

// What all lanes of the warp give.
template <class T>
static const T* everyone(const T& value)
{
    static T slots[8][2][32];  // two sets: nobody is two shuffles ahead
    const unsigned warp = current->index / 32, lane = current->index % 32, set = current->shuffles++ % 2;
    slots[warp][set][lane] = value;
    of_warp[warp].wait(32);
    return slots[warp][set];
}
template <class T> static T shuffle(T value, unsigned from) { return everyone(value)[from % 32]; }
template <class T> static T __shfl_xor_sync(unsigned, T value, int step) { return shuffle(value, (current->index % 32) ^ step); }
template <class T> static T __shfl_sync(unsigned, T value, int lane) { return shuffle(value, lane); }
static unsigned __reduce_max_sync(unsigned, unsigned value)
{
    const unsigned* all = everyone(value);
    for (int lane = 0; lane < 32; ++lane)
        value = value > all[lane] ? value : all[lane];
    return value;
}
static unsigned __reduce_min_sync(unsigned mask, unsigned value) { return ~__reduce_max_sync(mask, ~value); }

template <class T> static T __ldcg(const T* at) { return *at; }
static int atomicAdd(int* at, int value) { int old = *at; *at += value; return old; }
static float __fdividef(float a, float b) { return a / b; }
static int max(int a, int b) { return a > b ? a : b; }
static int min(int a, int b) { return a < b ? a : b; }
static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static unsigned __byte_perm(unsigned low, unsigned high, unsigned which)
{
    const unsigned long long both = low | (unsigned long long)high << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i)
        result |= (unsigned)(both >> (which >> i * 4 & 7) * 8 & 0xff) << i * 8;
    return result;
}
static float half_to_float(unsigned short bits) { _Float16 value; memcpy(&value, &bits, 2); return value; }
static unsigned float_to_half(float wide) { _Float16 value = wide; unsigned short bits; memcpy(&bits, &value, 2); return bits; }
static unsigned float_to_bfloat16(float wide) { const unsigned bits = __float_as_uint(wide); return (bits + 0x7fff + (bits >> 16 & 1)) >> 16; }

// c += a b as mma.m16n8k16 has its fragments; `widen` turns 16 bits into a float.
struct Fragments { float a[8], b[4]; };
static void multiply_fragments(float* c, const uint4& a, const uint2& b, float (*widen)(unsigned short))
{
    const unsigned words[6] = {a.x, a.y, a.z, a.w, b.x, b.y}, lane = current->index % 32;
    Fragments own;
    for (int i = 0; i < 8; ++i)
        own.a[i] = widen(words[i / 2] >> i % 2 * 16);
    for (int i = 0; i < 4; ++i)
        own.b[i] = widen(words[4 + i / 2] >> i % 2 * 16);
    const Fragments* all = everyone(own);
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k)
            c[i] += all[lane / 4 * 4 + k % 8 / 2].a[k / 8 * 4 + i / 2 * 2 + k % 2]
                * all[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2].b[k / 8 * 2 + k % 2];
}

static void (*body)();
static void one_thread()
{
    body();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

// Run all blocks, the last one first where `backwards`, as well as their threads.
static void run_grid(unsigned x, unsigned y, unsigned z, unsigned size, bool backwards, void (*kernel)())
{
    body = kernel, blockDim = {size, 1, 1}, gridDim = {x, y, z};
    for (unsigned block = 0; block < x * y * z; ++block) {
        const unsigned place = backwards ? x * y * z - 1 - block : block;
        blockIdx = {place % x, place / x % y, place / x / y};
        for (unsigned i = 0; i < size; ++i) {
            Thread& thread = threads[i];
            thread.index = i, thread.shuffles = 0, thread.done = false;
            thread.stack.resize(1 << 16);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
            makecontext(&thread.context, one_thread, 0);
        }
        for (unsigned left = size; left > 0;) {
            left = 0;
            for (unsigned i = 0; i < size; ++i) {
                current = &threads[backwards ? size - 1 - i : i];
                if (!current->done)
                    swapcontext(&scheduler, &current->context);
                left += !current->done;
            }
        }
    }
}
