// Attention of one new token of every row over cached keys and values by the tensor cores: half precision, d_kv of 64 or 128. attention.cuh is for
// everything else.
//
// A CTA takes CHUNK keys of one head, for one row or for up to SHARERS rows of a source; grid (H, rows or groups of them, chunks). A
// multiprocessor must have room for ATTENTION_CTAS of those with one row. Where a row has more keys, every CTA leaves its part, and the last
// one to finish adds the parts up in the order of the chunks. Chunks begin at fixed keys, so a result does not depend on how much room the
// cache has.
//
// A share is 16 neighbouring keys of a chunk. A warp takes one share after the other, reads keys and values as fragments of mma.m16n8k16 and
// leaves its sums, relative to the share's largest score, in shared memory; then the sums of all shares are added up in their order. Both products
// have 16 keys on one side, and on the other two columns for each row, because what is not stored in half precision is split into two halves, its
// rounded value and the rest. So a sum has the digits of float32 factors, and four rows cost what one does. A column does not depend on the
// others: the bits depend neither on the number of rows nor on that of warps.
//
// Lane l is in group l / 4 and has place l % 4. Of a key it reads the vector `place` of every 32 columns, of a value the vector `group` of
// every 64: any order of columns is as good as another, as long as both sides of a product have the same.
#pragma once
#include "attention_chunks.cuh"
#include "tensor_cores.cuh"

#ifndef ATTENTION_WARPS
#error "ATTENTION_WARPS must be 1, 2, 4 or 8, and ATTENTION_CTAS a number of CTAs"
#endif
constexpr int SHARE = 16, SHARES = CHUNK / SHARE;
constexpr int SHARERS = 4, SHARED_WARPS = 8;  // rows and warps of a CTA of attend_shared
static_assert(D == 64 || D == 128, "d_kv");

// What a share's keys give for a row: the largest score, and the sum of the weights relative to it.
struct ShareSums { float largest, total; };
template <int ROWS> struct SharedSums { ShareSums of[SHARES][ROWS]; float values[SHARES][ROWS][D]; };

__device__ __forceinline__ unsigned word(const uint4& vector, int i) { return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w; }

// Where keys and values lie for one lane of a share's first key, and which of them count.
struct Place {
    const char *keys, *values;
    const float* bias;
    const unsigned char* beam_of;  // in MOVED
    unsigned beam_of_newest;
    int start, count, end, width;  // `start` to `end` is this chunk's part of `count` keys
    int group, place;
    unsigned row_bytes;

    // The keys of a share whose scores this lane has, and those whose values it has, two and two neighbouring ones.
    __device__ __forceinline__ int key_at(int half) const { return group + half * 8; }
    __device__ __forceinline__ int value_at(int i) const { return place * 2 + (i & 1) + (i >> 1) * 8; }
};

// What a lane holds of a share.
template <bool SELF, bool MOVED> struct Share {
    int first, left;  // its first key, and the keys of the chunk from it on
    unsigned beam;    // where key `lane % 16` lies
    float bias[2];
    uint4 key[2][D / 32], value[4][D / 64];  // zeros in place of keys that do not count

    // What is known before its keys.
    __device__ __forceinline__ void load_places(const Place& at)
    {
        if (MOVED)
            beam = (int)(threadIdx.x % SHARE) < left ? at.beam_of[first + threadIdx.x % SHARE] : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = first + at.key_at(half);
            bias[half] = at.key_at(half) < left ? LOG2E * at.bias[SELF ? min(at.count - 1 - key, at.width - 1) : key] : -INFINITY;
        }
    }

    // `address` of a lane's first key, moved to where its key `key` of the share lies. By all lanes of a warp.
    __device__ __forceinline__ const char* moved(const char* address, int key, const Place& at) const
    {
        return MOVED ? further(address, __shfl_sync(0xffffffffu, beam, key), at.row_bytes) : address;
    }

    // The first `there` keys, and their values. (Loads by ld.global.cg, past the L1 cache, make a step 1 to 2% longer.)
    __device__ __forceinline__ void load_keys(const Place& at, int there)
    {
        const char* own = further(at.keys, first + at.group, KEY_BYTES);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4* from = (const uint4*)(moved(own, at.key_at(half), at) + half * 8 * (int)KEY_BYTES);
#pragma unroll
            for (int i = 0; i < D / 32; ++i)
                key[half][i] = at.key_at(half) < there ? load_before_wait(from + i * 4) : uint4{};
        }
    }
    __device__ __forceinline__ void load_values(const Place& at, int there)
    {
        const char* own = further(at.values, first + at.place * 2, KEY_BYTES);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4* from = (const uint4*)(moved(own, at.value_at(i), at) + ((i & 1) + (i >> 1) * 8) * (int)KEY_BYTES);
#pragma unroll
            for (int j = 0; j < D / 64; ++j)
                value[i][j] = at.value_at(i) < there ? load_before_wait(from + j * 8) : uint4{};
        }
    }

    // The key and the value that the kernel before wrote, `newest` keys from the first one on.
    __device__ __forceinline__ void load_newest(const Place& at, int newest)
    {
        const bool has_key = newest % 8 == at.group, has_value = newest % 8 / 2 == at.place;
        const char *own_key = further(at.keys, first + newest, KEY_BYTES), *own_value = further(at.values, first + newest, KEY_BYTES);
        if (MOVED)
            own_key = further(own_key, at.beam_of_newest, at.row_bytes), own_value = further(own_value, at.beam_of_newest, at.row_bytes);
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            const uint4 loaded = has_key ? __ldcg((const uint4*)own_key + i * 4) : uint4{};
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (newest == at.key_at(half))
                    key[half][i] = loaded;
        }
#pragma unroll
        for (int j = 0; j < D / 64; ++j) {
            const uint4 loaded = has_value ? __ldcg((const uint4*)own_value + j * 8) : uint4{};
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (newest == at.value_at(i))
                    value[i][j] = loaded;
        }
    }
};

// B fragments of a lane's query: its rounded values in even groups, the rest in odd ones.
struct Query {
    uint4 words[D / 32];

    // `from`: a head's query, stored by `put_query`, from this lane's part of the first 32 columns on.
    __device__ __forceinline__ void load(const float* from)
    {
#pragma unroll
        for (int i = 0; i < D / 32; ++i)
            words[i] = __ldcg((const uint4*)(from + i * 32));
    }
};

// The scores of a lane's two keys of a share for row `place`, times LOG2E. Returns the largest one of the share.
template <int ROWS, class Share>
__device__ __forceinline__ float multiply_keys(const Share& held, const Query& query, float (&score)[2])
{
    float sums[2][4] = {};
#pragma unroll
    for (int i = 0; i < D / 32; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 &low = held.key[0][i], &high = held.key[1][i];
            const uint4 a = {word(low, half * 2), word(high, half * 2), word(low, half * 2 + 1), word(high, half * 2 + 1)};
            multiply_tiles(sums[half], a, {word(query.words[i], half * 2), word(query.words[i], half * 2 + 1)});
        }
    float largest = HIDDEN;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        score[half] = held.bias[half] + ((sums[0][half * 2] + sums[1][half * 2]) + (sums[0][half * 2 + 1] + sums[1][half * 2 + 1]));
        largest = fmaxf(largest, score[half]);
    }
    if (ROWS == 1)  // all places have the same row
        return from_sortable(lanes_max(sortable(largest)));
#pragma unroll
    for (int step = 4; step < 32; step <<= 1)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    return largest;
}

// Leave the sums of a share's values, weighted by exp2 of the scores, for `rows` rows.
template <int ROWS, class Share>
__device__ __forceinline__ void leave_values(const Share& held, const Place& at, const float (&score)[2], float largest, int share, int rows,
                                             SharedSums<ROWS>& all)
{
    float total = 0.f;
    unsigned weights[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float weight = exp2_fast(score[half] - largest);
        total += weight;
        weights[half] = narrow_two(weight, weight - widen(narrow(weight)));
    }
    const int from = at.place * 8 + (at.group >> 1);  // the lane that has the first of this lane's values' keys, for this lane's column
    const unsigned which = at.group & 1 ? 0x7632 : 0x5410;
    uint2 b;
    b.x = __byte_perm(__shfl_sync(0xffffffffu, weights[0], from), __shfl_sync(0xffffffffu, weights[0], from + 4), which);
    b.y = __byte_perm(__shfl_sync(0xffffffffu, weights[1], from), __shfl_sync(0xffffffffu, weights[1], from + 4), which);
    total = sum_lanes(total, 4, 32);
    // of columns 64 i + 8 group + 2 j and the next: first both halves of the one, then of the other
    float sums[D / 64][4][4] = {};
#pragma unroll
    for (int i = 0; i < D / 64; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const unsigned two[4] = {word(held.value[0][i], j), word(held.value[1][i], j), word(held.value[2][i], j), word(held.value[3][i], j)};
            const uint4 a = {__byte_perm(two[0], two[1], 0x5410), __byte_perm(two[0], two[1], 0x7632), __byte_perm(two[2], two[3], 0x5410),
                             __byte_perm(two[2], two[3], 0x7632)};
            multiply_tiles(sums[i][j], a, b);
        }
    if (at.place >= rows)
        return;
    if (at.group == 0)
        all.of[share][at.place] = {largest, total};
#pragma unroll
    for (int i = 0; i < D / 64; ++i)
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            const float(&a)[4] = sums[i][j], (&b)[4] = sums[i][j + 1];
            *(float4*)(all.values[share][at.place] + i * 64 + at.group * 8 + j * 2) = {a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
        }
}

// Every WARPS-th of a chunk's shares, from share `warp` on; the words of this lane's query begin at `own_query`.
template <bool SELF, bool MOVED, int ROWS, int WARPS>
__device__ __forceinline__ void attend_shares(const Place& at, int warp, int shares, const float* queries, unsigned own_query, int rows,
                                              SharedSums<ROWS>& all)
{
    const int old = SELF ? at.count - 1 : at.count;  // keys that are there before the wait
    Share<SELF, MOVED> held;
    held.first = at.start + warp * SHARE, held.left = at.end - held.first;
    held.load_places(at);
    const int there = held.left + min(old - at.end, 0);
    held.load_keys(at, there);
    held.load_values(at, there);
    let_next_start();
    wait_for_inputs();
    if (warp >= shares)
        return;
    Query query;
    query.load(queries + own_query);
    if (SELF && old < at.end && there < SHARE)
        held.load_newest(at, there);
#pragma unroll 1
    for (int share = warp; share < shares; share += WARPS) {
        const bool more = WARPS < SHARES && share + WARPS < shares;
        float score[2];
        const float largest = multiply_keys<ROWS>(held, query, score);
        if (more) {
            held.first += WARPS * SHARE, held.left -= WARPS * SHARE;
            held.load_places(at);
            held.load_keys(at, held.left);
        }
        leave_values(held, at, score, largest, share, rows, all);
        if (!more)
            break;
        held.load_values(at, held.left);
    }
}

// Add up what the shares left, and store the result of `rows` rows from `row` on, or what the chunk knows of it.
template <int ROWS, int WARPS>
__device__ __forceinline__ void merge(const SharedSums<ROWS>& all, int shares, int count, int row, int rows, stored* attended, float* parts,
                                      int* arrived)
{
    constexpr int THREADS = WARPS * 32, PAIRS = ROWS * D / 2;
    const int chunks = (count + CHUNK - 1) / CHUNK;
#pragma unroll
    for (int round = 0; round < (PAIRS + THREADS - 1) / THREADS; ++round) {
        const int i = round * THREADS + threadIdx.x, own = i / (D / 2), column = i % (D / 2) * 2;
        if (own >= rows)
            break;
        ShareSums of[SHARES], merged = {HIDDEN, 0.f};
        float2 two[SHARES];
#pragma unroll
        for (int s = 0; s < SHARES; ++s) {
            of[s] = s < shares ? all.of[s][own] : ShareSums{HIDDEN, 0.f};
            two[s] = s < shares ? *(const float2*)(all.values[s][own] + column) : float2{};
            merged.largest = fmaxf(merged.largest, of[s].largest);
        }
        float low = 0.f, high = 0.f;
#pragma unroll
        for (int s = 0; s < SHARES; ++s) {
            const float factor = exp2_fast(of[s].largest - merged.largest);
            merged.total = fmaf(factor, of[s].total, merged.total);
            low = fmaf(factor, two[s].x, low), high = fmaf(factor, two[s].y, high);
        }
        if (chunks <= 1) {
            const float inverse = count ? __fdividef(1.f, merged.total) : 0.f;
            *(unsigned*)(attended + activation_index(row + own, blockIdx.x * D + column, HD_PAD)) = narrow_two(low * inverse, high * inverse);
        } else {
            float* of_chunk = parts_of(parts, row + own) + blockIdx.z * PART;
            of_chunk[2 + column] = low, of_chunk[3 + column] = high;
            if (column == 0)
                of_chunk[0] = merged.largest, of_chunk[1] = merged.total;
        }
    }
    if (chunks > 1)
        add_chunks<THREADS>(parts, chunks, row, rows, attended, arrived);
}

// MOVED: `ancestors` [rows][stride] says for each token of a row in which row of its `beams` neighbours the key and the value lie.
// SELF: keys up to and with the row's position, of which the last is written by the kernel before; the relative bias goes by the
// distance, bias [H][distances], the last entry serving all larger ones. Otherwise the keys of a source, which `beams` rows share, with
// bias [sources][width] (the additive mask) and lengths [sources].
//   query [rows][HD_PAD], stored by `put_query`; keys, values [rows or sources][H][capacity][D]; attended as `activation_index` describes
//   parts float32 [rows][H][chunks][PART]; arrived int32 [rows][H], zeros before and after
template <bool SELF, bool MOVED, int ROWS, int WARPS>
__device__ __forceinline__ void attend(const float* query, const stored* keys, const stored* values, const float* bias,
                                       const int* lengths, const unsigned char* ancestors, stored* attended, float* parts, int* arrived,
                                       int capacity, int width, int beams, int stride, SharedSums<ROWS>& all)
{
    const int groups = ROWS > 1 ? (beams + ROWS - 1) / ROWS : beams;  // of a source: its rows, ROWS at a time
    const int source = SELF ? blockIdx.y : blockIdx.y / (unsigned)groups, first = SELF || ROWS == 1 ? 0 : blockIdx.y % (unsigned)groups * ROWS;
    const int row = ROWS > 1 ? source * beams + first : blockIdx.y, rows = ROWS > 1 ? min(beams - first, ROWS) : 1;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);  // the compiler does not know that a warp's lanes have the same
    Place at;
    at.start = blockIdx.z * CHUNK;
    at.count = SELF ? lengths[row] + 1 : lengths[source];
    at.end = min(at.count, at.start + CHUNK);
    at.width = width;
    at.group = (threadIdx.x & 31) >> 2, at.place = threadIdx.x & 3;
    at.bias = bias + (SELF ? blockIdx.x : source) * (unsigned long long)(unsigned)width;
    at.beam_of = ancestors + row * (unsigned long long)(unsigned)stride;
    at.beam_of_newest = MOVED ? at.beam_of[at.count - 1] : 0;
    at.row_bytes = H * capacity * KEY_BYTES;
    if (at.start >= at.count && at.start > 0)  // not the first chunk of a row that has no keys
        return let_next_start();
    const unsigned holder = MOVED ? row - row % (unsigned)beams : source, head_bytes = blockIdx.x * capacity * KEY_BYTES;
    at.keys = further((const char*)keys + head_bytes + at.place * 16, holder, at.row_bytes);
    at.values = further((const char*)values + head_bytes + at.group * 16, holder, at.row_bytes);
    // these through shuffles, so that the compiler does not put off what it takes to find them until after the wait
    const int shares = __shfl_sync(0xffffffffu, (max(at.end - at.start, 1) + SHARE - 1) / SHARE, 0);
    const int own_row = row + (ROWS > 1 ? min(at.group >> 1, rows - 1) : 0);
    const unsigned own_query = __shfl_sync(0xffffffffu, own_row * HD_PAD + blockIdx.x * D + at.place * 8 + (at.group & 1) * 4, threadIdx.x & 31);
    attend_shares<SELF, MOVED, ROWS, WARPS>(at, warp, shares, query, own_query, rows, all);
    __syncthreads();
    merge<ROWS, WARPS>(all, shares, at.count, row, rows, attended, parts, arrived);
}

extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, ATTENTION_CTAS)
attend_self(const float* query, const stored* keys, const stored* values, const float* bias, const int* position, stored* attended, float* parts,
            int* arrived, int capacity, int distances)
{
    __shared__ SharedSums<1> all;
    attend<true, false, 1, ATTENTION_WARPS>(query, keys, values, bias, position, nullptr, attended, parts, arrived, capacity, distances, 1, 0, all);
}

// A kernel of its own, as few rows are the slower the more code there is.
extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, ATTENTION_CTAS)
attend_moved(const float* query, const stored* keys, const stored* values, const float* bias, const int* position, stored* attended, float* parts,
             int* arrived, int capacity, int distances, const unsigned char* ancestors, int beams, int stride)
{
    __shared__ SharedSums<1> all;
    attend<true, true, 1, ATTENTION_WARPS>(query, keys, values, bias, position, ancestors, attended, parts, arrived, capacity, distances, beams, stride, all);
}

extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, ATTENTION_CTAS)
attend_cross(const float* query, const stored* keys, const stored* values, const float* mask, const int* lengths, stored* attended,
             float* parts, int* arrived, int capacity, int width, int beams)
{
    __shared__ SharedSums<1> all;
    attend<false, false, 1, ATTENTION_WARPS>(query, keys, values, mask, lengths, nullptr, attended, parts, arrived, capacity, width, beams, 0, all);
}

// The rows of a source together. Grid (H, sources times ceil(beams / SHARERS), chunks).
extern "C" __global__ void __launch_bounds__(SHARED_WARPS * 32, 2)
attend_shared(const float* query, const stored* keys, const stored* values, const float* mask, const int* lengths, stored* attended,
              float* parts, int* arrived, int capacity, int width, int beams)
{
    __shared__ SharedSums<SHARERS> all;
    attend<false, false, SHARERS, SHARED_WARPS>(query, keys, values, mask, lengths, nullptr, attended, parts, arrived, capacity, width, beams, 0, all);
}
