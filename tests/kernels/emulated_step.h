// What the decoder's kernels need beside emulated_warp.h.
#pragma once
#include <map>

#include "emulated_warp.h"

#define __host__
#define __cluster_dims__(...)
#define shared (attention_memory + own_cta * CTA_MEMORY)
template <class T> static T __ldcg(const T* from) { return *from; }
static uint4 load_streaming(const void* from)
{
    if ((uintptr_t)from % 16)
        fprintf(stderr, "a load is not aligned\n"), abort();
    return *(const uint4*)from;
}
static uint4 load_before_wait(const void* from) { return load_streaming(from); }
static void prefetch(const void*) {}
static const uint4* count_from(const uint4* address) { return address; }
template <class T> static T load_in_order(const T* from) { return *from; }
static void let_next_start() {}
static void wait_for_inputs() {}
static unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, int step)
{
    const unsigned low = __float_as_uint(__shfl_xor_sync(mask, __uint_as_float(value), step));
    return (unsigned long long)__float_as_uint(__shfl_xor_sync(mask, __uint_as_float(value >> 32), step)) << 32 | low;
}
static unsigned __reduce_max_sync(unsigned mask, unsigned value)
{
    for (int step = 1; step < 32; step <<= 1)
        value = std::max(value, __float_as_uint(__shfl_xor_sync(mask, __uint_as_float(value), step)));
    return value;
}
static unsigned __reduce_min_sync(unsigned mask, unsigned value) { return ~__reduce_max_sync(mask, ~value); }
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

// Products of warp groups read their rows when they are waited for, not before, and their sums are NaN until then.
struct Sums { int under_way = 0; std::vector<float> kept; };
static std::map<unsigned, std::deque<std::vector<std::function<void()>>>> products_of;  // of each thread, groups of products; the last one is not ended
static std::map<std::pair<unsigned, float*>, Sums> sums_of;
static auto& own_products()
{
    auto& groups = products_of[own_thread()];
    if (groups.empty())
        groups.emplace_back();
    return groups;
}
static void begin_products() { meet_warp(); }
static void end_products() { own_products().emplace_back(); }
static void show_to_products() {}
template <int LATER, int COUNT> void wait_for_products(float*)
{
    for (auto& groups = own_products(); groups.size() > LATER + 1; groups.pop_front())
        for (auto& product : groups.front())
            product();
}
template <int ROW_COUNT, bool ADDS> void multiply_group(float* sums, const uint4& a, unsigned long long rows)
{
    const int lane = own_lane();
    const unsigned words[4] = {a.x, a.y, a.z, a.w};
    for (int i = 0; i < 8; ++i)
        lane_of(lane).a[i] = widen(words[i / 2] >> i % 2 * 16);
    meet_warp();
    std::vector<float> weights(32);  // of this lane's two outputs
    for (int i = 0; i < 32; ++i)
        weights[i] = lane_of(lane / 4 * 4 + i % 8 / 2).a[i % 16 / 8 * 4 + i / 16 * 2 + i % 2];
    meet_warp();
    Sums& own = sums_of[{own_thread(), sums}];
    if (own.under_way++ == 0)
        own.kept.assign(sums, sums + ROW_COUNT / 2);
    else if (!ADDS)
        fprintf(stderr, "a product overwrites sums that are under way\n"), abort();
    std::fill(sums, sums + ROW_COUNT / 2, NAN);
    own_products().back().push_back([=, &own] {
        if (!std::isnan(sums[0]))
            fprintf(stderr, "sums of a product were changed before it was made\n"), abort();
        for (int i = 0; i < ROW_COUNT / 2; ++i) {
            const char* row = shared + (rows & 0x3fff) * 16 + i / 4 * (rows >> 32) * 16 + (lane % 4 * 2 + i % 2) * 16;
            float sum = ADDS ? own.kept[i] : 0.f;
            for (int k = 0; k < 16; ++k) {
                unsigned short value;
                memcpy(&value, row + k / 8 * 128 + k % 8 * 2, 2);
                sum += weights[i / 2 % 2 * 16 + k] * widen(value);
            }
            own.kept[i] = sum;
        }
        if (--own.under_way == 0)
            std::copy(own.kept.begin(), own.kept.end(), sums);
    });
}

// Clusters. A mailbox holds the bytes that are still to come.
static std::map<std::pair<int, int>, Meeting> groups_of_threads;
static void arrive_at_cluster() { ++arrived_at_cluster, ++progress; }
static void wait_for_cluster()
{
    while (arrived_at_cluster < (long)threads.size())
        give_way();
}
static void meet_threads(int group, int count) { meet(groups_of_threads[{own_cta, group}], count); }
static void open_mailbox(unsigned long long* box, int bytes) { *box = bytes; }
static void send(float* to, unsigned long long* box, int cta, const float4& values)
{
    const long away = (long)(cta - own_cta) * CTA_MEMORY;
    if (arrived_at_cluster < (long)threads.size())
        fprintf(stderr, "a CTA sends before the others have come\n"), abort();
    unsigned long long& left = *(unsigned long long*)((char*)box + away);
    if (left < 16 || left > CTA_MEMORY)
        fprintf(stderr, "more bytes are sent than the mailbox was opened for\n"), abort();
    memcpy((char*)to + away, &values, 16);
    left -= 16, ++progress;
}
static bool has_come(unsigned long long* box)
{
    if (*box)
        give_way();
    return *box == 0;
}
static void stop_kernel() { abort(); }
