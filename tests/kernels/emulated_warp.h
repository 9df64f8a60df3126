// Runs CUDA kernels on a CPU, a CTA or a cluster of CTAs at a time: each of its threads is a coroutine that goes on until it needs the others. Asynchronous copies
// are done when they are waited for, not before, and shared memory begins with NaN; a barrier that some threads never reach is an error.
// What warps do together follows the fragments of PTX's documentation (ldmatrix, mma.m16n8k16).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
using std::max;
using std::min;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static dim3 blockIdx, blockDim, gridDim, threadIdx;
extern "C" { int cluster_ctas = 1; }  // CTAs of a cluster, along x
constexpr int MOST_CTAS = 8, CTA_MEMORY = 1 << 18;
alignas(16) char attention_memory[MOST_CTAS * CTA_MEMORY];
static int own_cta;  // of the cluster
static unsigned first_block;
static long arrived_at_cluster;  // threads

struct Copy { unsigned to; const void* from; int bytes; bool there; };
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    std::deque<std::vector<Copy>> groups;  // of copies under way; the last one is not ended
};
struct Meeting { int arrived = 0; long round = 0; };
struct Lane { float a[8], b[4]; unsigned word; };
static std::vector<Thread> threads;
static std::vector<Meeting> meetings;  // of each warp of the cluster, then of each CTA
static std::vector<Lane> lanes;
static ucontext_t host;
static long progress;
static std::function<void()> body;

static unsigned own_thread() { return own_cta * blockDim.x + threadIdx.x; }  // of the cluster
static void become(unsigned thread)
{
    own_cta = thread / blockDim.x, threadIdx.x = thread % blockDim.x, blockIdx.x = first_block + own_cta;
}
static void give_way()
{
    const unsigned own = own_thread();
    swapcontext(&threads[own].context, &host);
    become(own);
}
static void meet(Meeting& meeting, int count)
{
    const long round = meeting.round;
    if (++meeting.arrived == count)
        meeting.arrived = 0, ++meeting.round, ++progress;
    while (meeting.round == round)
        give_way();
}
static void meet_warp() { meet(meetings[own_thread() / 32], 32); }
static void __syncwarp() { meet_warp(); }
static void __syncthreads() { meet(meetings[threads.size() / 32 + own_cta], blockDim.x); }
static Lane& lane_of(int lane) { return lanes[own_thread() / 32 * 32 + lane]; }
static int own_lane() { return threadIdx.x % 32; }

static unsigned __ballot_sync(unsigned, bool value)
{
    lane_of(own_lane()).word = value;
    meet_warp();
    unsigned all = 0;
    for (int i = 0; i < 32; ++i)
        all |= lane_of(i).word << i;
    meet_warp();
    return all;
}
static bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value); }
static bool __all_sync(unsigned mask, bool value) { return !~__ballot_sync(mask, value); }
static bool __syncthreads_or(bool value)
{
    lanes[own_thread()].word = value;
    __syncthreads();
    bool any = false;
    for (const Lane& lane : lanes)
        any |= lane.word;
    __syncthreads();
    return any;
}
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static float rsqrtf(float x) { return 1.f / std::sqrt(x); }
static float __shfl_xor_sync(unsigned, float value, int step)
{
    lane_of(own_lane()).word = __float_as_uint(value);
    meet_warp();
    const float found = __uint_as_float(lane_of(own_lane() ^ step).word);
    meet_warp();
    return found;
}
static size_t __cvta_generic_to_shared(const void* address) { return (const char*)address - attention_memory; }

#if STORAGE == 1
static float widen(unsigned short value) { return __uint_as_float((unsigned)value << 16); }
static unsigned short narrow(float value)
{
    const unsigned bits = __float_as_uint(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
static float widen(unsigned short value) { _Float16 half; memcpy(&half, &value, 2); return half; }
static unsigned short narrow(float value) { const _Float16 half = value; unsigned short bits; memcpy(&bits, &half, 2); return bits; }
#endif
static unsigned narrow_two(float low, float high) { return narrow(low) | (unsigned)narrow(high) << 16; }
static float power_of_two(float x) { return std::exp2(x); }

static void copy_some(unsigned to, const void* from, bool there, int bytes)
{
    if (to % bytes || (uintptr_t)from % bytes)
        fprintf(stderr, "a copy of %d bytes is not aligned\n", bytes), abort();
    threads[own_thread()].groups.back().push_back({to, from, bytes, there});
}
static void copy_async(unsigned to, const void* from, bool there) { copy_some(to, from, there, 16); }
static void copy_word_async(unsigned to, const void* from, bool there) { copy_some(to, from, there, 4); }
static void end_group() { threads[own_thread()].groups.emplace_back(); }
template <int LATER> void wait_for_group()
{
    auto& groups = threads[own_thread()].groups;
    for (; groups.size() > LATER + 1; groups.pop_front())
        for (const Copy& copy : groups.front())
            copy.there ? (void)memcpy(attention_memory + (int)copy.to, copy.from, copy.bytes) : (void)memset(attention_memory + (int)copy.to, 0, copy.bytes);
}

// Four matrices of 8 rows of 16 bytes; the rows' addresses come from lanes 8 i to 8 i + 7.
static uint4 load_four(unsigned address, bool transposed)
{
    if (address % 16)
        fprintf(stderr, "a row of ldmatrix is not aligned\n"), abort();
    const int lane = own_lane();
    lane_of(lane).word = address;
    meet_warp();
    unsigned found[4];
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned short both[2];
        for (int k = 0; k < 2; ++k) {
            const int row = transposed ? lane % 4 * 2 + k : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + k;
            memcpy(&both[k], attention_memory + lane_of(matrix * 8 + row).word + column * 2, 2);
        }
        found[matrix] = both[0] | (unsigned)both[1] << 16;
    }
    meet_warp();
    return {found[0], found[1], found[2], found[3]};
}
static uint4 load_matrices(unsigned address) { return load_four(address, false); }
static uint4 load_transposed(unsigned address) { return load_four(address, true); }

static void multiply_tiles(float* c, const uint4& a, const uint2& b)
{
    const int lane = own_lane(), group = lane / 4, thread = lane % 4;
    const unsigned words[6] = {a.x, a.y, a.z, a.w, b.x, b.y};
    Lane& own = lane_of(lane);
    for (int i = 0; i < 8; ++i)
        own.a[i] = widen(words[i / 2] >> i % 2 * 16);
    for (int i = 0; i < 4; ++i)
        own.b[i] = widen(words[4 + i / 2] >> i % 2 * 16);
    meet_warp();
    for (int i = 0; i < 4; ++i) {
        const int row = group + (i < 2 ? 0 : 8), column = thread * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int a_place = k / 8 * 4 + row / 8 * 2 + k % 2, b_place = k / 8 * 2 + k % 2;
            c[i] += lane_of(row % 8 * 4 + k % 8 / 2).a[a_place] * lane_of(column * 4 + k % 8 / 2).b[b_place];
        }
    }
    meet_warp();
}

static void start_thread()
{
    body();
    threads[own_thread()].done = true;
    ++progress;
    swapcontext(&threads[own_thread()].context, &host);
}
static void run_cluster(int count)
{
    count *= cluster_ctas;
    memset(attention_memory, 0xff, (size_t)cluster_ctas * CTA_MEMORY);
    arrived_at_cluster = 0;
    threads = std::vector<Thread>(count);
    meetings.assign(count / 32 + cluster_ctas, {});
    lanes.assign(count, {});
    for (Thread& thread : threads) {
        thread.stack.resize(1 << 16);
        thread.groups.emplace_back();
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.context, start_thread, 0);
    }
    for (int left = count; left;) {
        const long before = progress;
        for (unsigned i = 0; i < threads.size(); ++i)
            if (!threads[i].done) {
                become(i);
                swapcontext(&host, &threads[i].context);
                left -= threads[i].done;
            }
        if (progress == before)
            fprintf(stderr, "threads wait for each other for ever\n"), abort();
    }
}
template <class Body> void run_grid(int x, int y, int z, int count, Body work)
{
    body = work;
    blockDim = {(unsigned)count, 1, 1}, gridDim = {(unsigned)x, (unsigned)y, (unsigned)z};
    if (x % cluster_ctas)
        fprintf(stderr, "a grid of %d CTAs has no whole clusters\n", x), abort();
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (first_block = 0; first_block < gridDim.x; first_block += cluster_ctas)
                run_cluster(count);
}
