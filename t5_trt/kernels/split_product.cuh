// Products with a long k and few outputs for several rows: the sums of product.cuh, bit for bit, with fewer reads of weights and rows.
//
// CLUSTER CTAs make the same 16 * OUT_TILES outputs for 8 * OWN_ROW_TILES rows, each of its part of k: that is some of product.cuh's parts, each by
// OUT_TILES warps with a tile of outputs each, which share the part's rows. A CTA adds its parts up and sends the sums to the CTA of its cluster that
// hands them over: each has some of the rows.
#pragma once
#include "product.cuh"
#include "warpgroup.cuh"

#if ADD_SPLIT || OUT_SPLIT
constexpr int CLUSTER = SPLIT_CTAS;      // CTAs that share k: 2, 4 or 8
constexpr int SPLIT_BYTES = 190 * 1024;  // of shared memory for rows
constexpr int SPLIT_REGISTERS = 44;      // of a thread, for what is neither weights nor sums
constexpr int MOST_TRIES = 1 << 24;      // to find what other CTAs have sent

// All CTAs of a cluster say that they have come, and wait for the others.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Counts the bytes that other CTAs of the cluster write into this one's shared memory. One thread opens it before the CTA arrives at the cluster.
typedef unsigned long long Mailbox;
__device__ __forceinline__ void open_mailbox(Mailbox* box, int bytes)
{
    const unsigned at = (unsigned)__cvta_generic_to_shared(box);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(at), "r"(bytes) : "memory");
}
// Write 16 bytes into the shared memory of a CTA of the cluster, to the place that `to` is in this one's, and have its mailbox count them.
__device__ __forceinline__ void send(float* to, Mailbox* box, int cta, const float4& values)
{
    asm volatile("{.reg .b32 there, box; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 box, %1, %2;"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [box];}" ::"r"(
                     (unsigned)__cvta_generic_to_shared(to)), "r"((unsigned)__cvta_generic_to_shared(box)), "r"(cta), "f"(values.x), "f"(values.y),
                 "f"(values.z), "f"(values.w)
                 : "memory");
}
// Whether all bytes have come; waits for a moment if not.
__device__ __forceinline__ bool has_come(Mailbox* box)
{
    int done;
    asm volatile("{.reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0; selp.b32 %0, 1, 0, done;}"
                 : "=r"(done) : "r"((unsigned)__cvta_generic_to_shared(box)) : "memory");
    return done;
}
__device__ __forceinline__ void stop_kernel() { asm volatile("trap;"); }
// Wait for all bytes. The CTAs of a cluster run at the same time, so they come.
__device__ __forceinline__ void receive(Mailbox* box)
{
    for (int i = 0; i < MOST_TRIES; ++i)
        if (has_come(box))
            return;
    stop_kernel();
}
// Wait for the `count` threads of a group; `group` is 1 or more.
__device__ __forceinline__ void meet_threads(int group, int count) { asm volatile("bar.sync %0, %1;" ::"r"(group), "r"(count) : "memory"); }

// TOTAL: tiles of outputs in all.
template <int TOTAL, int OUT_TILES, int OWN_ROW_TILES, int K_TILES>
struct SplitProduct {
    static constexpr int TOTAL_TILES = TOTAL, TILES = OUT_TILES, INPUTS = K_TILES, OWN_ROWS = OWN_ROW_TILES * 8, CLUSTER_CTAS = CLUSTER;
    static constexpr int PARTS = PRODUCT_WARPS / CLUSTER, TEAM = OUT_TILES * 32, THREADS = PARTS * TEAM, CTAS = 1;  // TEAM: threads of a part
    static constexpr int PER_PART = K_TILES / PRODUCT_WARPS;
    static constexpr int STEP = largest_part(PER_PART, 4), STEPS = PER_PART / STEP;  // k tiles that are copied together
    static constexpr int STEP_BYTES = OWN_ROW_TILES * STEP * BLOCK;
    static constexpr int FREE = least(255, 65536 / THREADS / 8 * 8) - SPLIT_REGISTERS - OWN_ROW_TILES * 4 - (INT8 ? 8 : 0);  // registers for weights
    static constexpr int FITTING = least(least(32, FREE / 4) / STEP, SPLIT_BYTES / (PARTS * STEP_BYTES));
    static constexpr int DEPTH = even_part(STEPS, least(STEPS, most(1, FITTING)));  // steps on their way
    static constexpr int PART_BYTES = DEPTH * STEP_BYTES, SUMS = OUT_TILES * OWN_ROWS * STRIDE;  // SUMS: floats of a part
    static constexpr int HANDED = OWN_ROWS / CLUSTER, SENT = OUT_TILES * HANDED * 16;  // rows that a CTA hands over; floats that each CTA sends it
    static constexpr int RECEIVED = PARTS * most(PART_BYTES, SUMS * 4), BOX = RECEIVED + CLUSTER * SENT * 4, SHARED = BOX + 16;  // bytes before each
    static constexpr bool GROUPED = WARPGROUPS && OUT_TILES % 4 == 0;  // a warp group multiplies
    static_assert(K_TILES % PRODUCT_WARPS == 0 && OWN_ROWS % CLUSTER == 0, "whole parts");
    static_assert(SHARED <= 224 * 1024, "shared memory");

    uint4 held[DEPTH * STEP];
    float sums[OWN_ROW_TILES * 4];
    const uint4* matrix;  // a lane's weights of the part
    char* region;         // of the part
    int lane, tile, part, cta, first;

    // Start to load weights of the outputs from a tile on; nothing that another kernel writes is read.
    __device__ __forceinline__ SplitProduct(const uint4* weights, int first_tile, int own_cta) : cta(own_cta)
    {
        const int warp = threadIdx.x >> 5;
        lane = threadIdx.x & 31, part = warp / OUT_TILES, tile = warp % OUT_TILES, region = shared + part * PART_BYTES;
        first = (cta * PARTS + part) * PER_PART;
        matrix = count_from(weights_at<K_TILES>(weights, (tile_of<TOTAL, OUT_TILES>(first_tile, tile)), first) + lane);
        if (threadIdx.x == 0)
            open_mailbox((Mailbox*)(shared + BOX), CLUSTER * SENT * 4);
        arrive_at_cluster();
#pragma unroll
        for (int i = 0; i < DEPTH * STEP; ++i)
            held[i] = load_weights(matrix + i * WEIGHT_PIECES, true);
#pragma unroll
        for (int i = 0; i < OWN_ROW_TILES * 4; ++i)
            sums[i] = 0.f;
    }

    __device__ __forceinline__ void copy_rows(int step, const void* x, int row0, int rows)
    {
        const unsigned to = (unsigned)__cvta_generic_to_shared(region) + step % DEPTH * STEP_BYTES;
        copy_row_tiles<TEAM, OWN_ROW_TILES, STEP, K_TILES>(to, x, first, step * STEP, row0, rows, threadIdx.x % TEAM);
    }

    // Start to read the rows from `row0` on.
    __device__ __forceinline__ void begin(const void* x, int row0, int rows)
    {
#pragma unroll
        for (int step = 0; step < DEPTH; ++step) {
            copy_rows(step, x, row0, rows);
            end_group();
        }
    }

    // Multiply, exchange sums, and have those of the rows that this CTA hands over for `total`.
    __device__ __forceinline__ void run(const void* x, int row0, int rows)
    {
#pragma unroll 1
        for (int base = 0; base < STEPS; base += DEPTH)
#pragma unroll
            for (int place = 0; place < DEPTH; ++place) {
                const int step = base + place;
                if (STEPS % DEPTH && step >= STEPS)
                    break;
                wait_for_group<DEPTH - 1>();
                show_rows();
                meet_threads(1 + part, TEAM);
                multiply(place);
                if (STEPS > DEPTH && step + DEPTH < STEPS) {
                    wait_for_sums();
                    meet_threads(1 + part, TEAM);
#pragma unroll
                    for (int i = 0; i < STEP; ++i)
                        held[place * STEP + i] = load_weights(matrix + ((step + DEPTH) * STEP + i) * WEIGHT_PIECES, false);
                    copy_rows(step + DEPTH, x, row0, rows);
                }
                end_group();  // an empty one, too: the wait counts groups
            }
        wait_for_sums();
        leave();
        exchange();
    }

    __device__ __forceinline__ void show_rows()
    {
#if WARPGROUPS
        if constexpr (GROUPED)
            show_to_products();
#endif
    }

    __device__ __forceinline__ void wait_for_sums()
    {
#if WARPGROUPS
        if constexpr (GROUPED)
            wait_for_products<0, OWN_ROW_TILES * 4>(sums);
#endif
    }

    // Multiply by the step at `place`.
    __device__ __forceinline__ void multiply(int place)
    {
        const char* at = region + place * STEP_BYTES;
#if WARPGROUPS
        if constexpr (GROUPED) {
            const unsigned long long rows = describe_rows(at, STEP * BLOCK);
            begin_products();
#pragma unroll
            for (int k = 0; k < STEP; ++k)
                multiply_group<OWN_ROWS, true>(sums, held[place * STEP + k], rows + k * (BLOCK / 16));
            end_products();
            return;
        }
#endif
#pragma unroll
        for (int k = 0; k < STEP; ++k) {
            const Factor a(held[place * STEP + k]);
#pragma unroll
            for (int t = 0; t < OWN_ROW_TILES; ++t)
                multiply_tiles(sums + t * 4, a, lane_rows(at + (t * STEP + k) * BLOCK, lane));
        }
    }

    // Leave the sums of a part for `exchange`.
    __device__ __forceinline__ void leave()
    {
        __syncthreads();  // rows lie where the sums go
        store_sums<OWN_ROW_TILES * 4>((float*)shared + part * SUMS + tile * OWN_ROWS * STRIDE, sums, lane);
        wait_for_cluster();  // the others' mailboxes are open
        __syncthreads();
    }

    // Send the CTA's sums of every row to the CTA that hands it over, and wait for what the others send.
    __device__ __forceinline__ void exchange()
    {
        constexpr int COUNT = OUT_TILES * OWN_ROWS * 4;
        float* received = (float*)(shared + RECEIVED) + cta * SENT;
        Mailbox* box = (Mailbox*)(shared + BOX);
#pragma unroll
        for (int first = 0; first < COUNT; first += THREADS) {
            const int i = first + threadIdx.x, from = i >> 2, row = from % OWN_ROWS, own_tile = from / OWN_ROWS, column = (i & 3) * 4;
            if (COUNT % THREADS && i >= COUNT)
                break;
            float4 parts[PARTS];
#pragma unroll
            for (int p = 0; p < PARTS; ++p)
                parts[p] = *(const float4*)((float*)shared + p * SUMS + sums_of_row(from) + column);
            send(received + (own_tile * HANDED + row % HANDED) * 16 + column, box, row / HANDED, sum_in_pairs<PARTS>(parts));
        }
        receive(box);
    }

    // One output of a tile for one of the rows that this CTA hands over, all counted from the first.
    static __device__ __forceinline__ float total(int tile, int output, int row)
    {
        const float* first = (const float*)(shared + RECEIVED) + (tile * HANDED + row) * 16 + output;
        float sums[CLUSTER];
#pragma unroll
        for (int i = 0; i < CLUSTER; ++i)
            sums[i] = first[i * SENT];
        return sum_in_pairs<CLUSTER>(sums);
    }
};
#endif
