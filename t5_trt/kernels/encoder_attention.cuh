// The encoder's self-attention in flash form (Dao et al. 2022): softmax(q k + bias) v by tiles of 64 keys, sums in float32, no [S, S] anywhere.
//
// A warp has M_TILES times 16 queries of one head and row. Keys and values come through shared memory, the next tile while this one is used,
// and with them the relative bias of the tile: a value for each distance, as a score's bias depends on key - query only.
// Which tiles of keys there are to look at, and which keys of them are hidden, `list_keys` has said; what a query gets depends on neither
// the rows beside it nor M_TILES.
//
// Sources come as a batch of one length, or packed, one behind another without padding between them: then `list_queries` has said which queries
// of which source a CTA has. Tiles begin where a source begins, so that a packed source gets the bits that it would get in a batch.
#pragma once
#include "tensor_cores.cuh"
#if STORAGE == FLOAT32
#error "the tensor cores' attention has half precision only"
#endif

constexpr int KEYS = 64, ATTENTION_WARPS = 4, ATTENTION_THREADS = ATTENTION_WARPS * 32;
constexpr int HD = H * D, D_PAD = (D + 15) / 16 * 16, D_CHUNKS = D_PAD / 8;  // a chunk is 16 bytes
constexpr int PITCH = (D_PAD + 8) * 2;  // bytes of a row in shared memory: an odd number of chunks, so that no 8 rows share banks
constexpr int MOST_TILES = D_PAD <= 64 ? 2 : 1;  // of a warp; more would not fit into registers
constexpr float LOG2_E = 1.4426950408889634f;
// in a mask: there is no token (`NO_KEY` in t5_trt/runtime/torch_layers.py)
constexpr long long NO_KEY = -(1ll << 62);

// What a CTA holds in shared memory, in bytes from its beginning.
template <int M_TILES> struct AttentionMemory {
    static constexpr int QUERIES = ATTENTION_WARPS * M_TILES * 16;
    static constexpr int DISTANCES = QUERIES + KEYS;  // of a tile of keys, and one that pads
    static constexpr int TILE = KEYS * PITCH;
    static constexpr int KEY_TILES = QUERIES * PITCH, VALUE_TILES = KEY_TILES + 2 * TILE, BIAS = VALUE_TILES + 2 * TILE;
    static constexpr int HIDE = BIAS + 2 * DISTANCES * 4, BYTES = HIDE + 2 * KEYS * 4;
};

// Four matrices of 8 x 8: lane l gives the address of row l % 8 of matrix l / 8 and gets of each matrix the elements 2 (l % 4) and the next
// of row l / 4; with `transposed` those of column l / 4.
__device__ __forceinline__ uint4 load_matrices(unsigned address)
{
    uint4 value;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address));
    return value;
}
__device__ __forceinline__ uint4 load_transposed(unsigned address)
{
    uint4 value;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address));
    return value;
}
__device__ __forceinline__ float power_of_two(float x)
{
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}
__device__ __forceinline__ float most_of_four(float value)
{
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// What a CTA copies into shared memory.
template <int M_TILES> struct AttentionTiles {
    typedef AttentionMemory<M_TILES> Memory;
    const stored* qkv;   // of the source and head: [S][3 HD]
    const float* bias;   // of the head, [2 limit + 1]
    const float* hide;   // of the source
    unsigned memory;
    int query0, length, limit;
    bool uniform;

    // `count` tokens from `token` on, of q, k or v (0, 1, 2).
    __device__ __forceinline__ void copy_rows(unsigned to, int which, int token, int count) const
    {
        for (int i = threadIdx.x; i < count * D_CHUNKS; i += ATTENTION_THREADS) {
            const int row = i / D_CHUNKS, chunk = i % D_CHUNKS;
            const bool there = token + row < length && chunk * 8 < D;
            const stored* from = qkv + (there ? (long long)(token + row) * (3 * HD) + which * HD + chunk * 8 : 0);
            copy_async(memory + to + row * PITCH + chunk * 16, from, there);
        }
    }

    __device__ __forceinline__ void copy_queries() const { copy_rows(0, 0, query0, Memory::QUERIES); }

    // Keys, values, bias and mask of a tile; place i of the bias is that of key - query = i - (QUERIES - 1) for the first of both.
    __device__ __forceinline__ void copy_keys(int tile, int stage) const
    {
        const int key0 = tile * KEYS;
        copy_rows(Memory::KEY_TILES + stage * Memory::TILE, 1, key0, KEYS);
        copy_rows(Memory::VALUE_TILES + stage * Memory::TILE, 2, key0, KEYS);
        for (int i = threadIdx.x; i < Memory::DISTANCES; i += ATTENTION_THREADS) {
            const int distance = key0 - query0 - (Memory::QUERIES - 1) + i;
            copy_word_async(memory + Memory::BIAS + (stage * Memory::DISTANCES + i) * 4, bias + limit + min(max(distance, -limit), limit), !uniform);
        }
        if (threadIdx.x < KEYS / 4)
            copy_async(memory + Memory::HIDE + (stage * KEYS + threadIdx.x * 4) * 4, hide + key0 + threadIdx.x * 4, true);
    }
};

// What a warp keeps of its queries. Lane l has, of every tile of 16, queries l / 4 and l / 4 + 8 (`half` 0 and 1).
template <int M_TILES> struct AttentionState {
    uint4 queries[M_TILES][D_PAD / 16];  // A fragments of 16 queries and 16 columns
    float sums[M_TILES][D_CHUNKS][4];  // of values: columns 8 i + 2 (l % 4) and the next, of either half
    float largest[M_TILES][2], total[M_TILES][2];  // of scores times log2(e); `total` of this lane's keys only

    __device__ __forceinline__ void begin()
    {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < D_CHUNKS; ++i)
                sums[m][i][0] = sums[m][i][1] = sums[m][i][2] = sums[m][i][3] = 0.f;
            largest[m][0] = largest[m][1] = -INFINITY;
            total[m][0] = total[m][1] = 0.f;
        }
    }

    __device__ __forceinline__ void load_queries(unsigned rows, int lane)
    {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int step = 0; step < D_PAD / 16; ++step)
                queries[m][step] = load_matrices(rows + (m * 16 + lane % 16) * PITCH + (step * 2 + lane / 16) * 16);
    }

    // scores[tile of 8 keys]: keys 8 i + 2 (l % 4) and the next, of either half.
    __device__ __forceinline__ void score(float (&scores)[M_TILES][KEYS / 8][4], unsigned keys, int lane)
    {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i)
                scores[m][i][0] = scores[m][i][1] = scores[m][i][2] = scores[m][i][3] = 0.f;
#pragma unroll
        for (int step = 0; step < D_PAD / 16; ++step) {
#pragma unroll
            for (int i = 0; i < KEYS / 8; i += 2) {
                const uint4 b = load_matrices(keys + (i * 8 + lane / 16 * 8 + lane % 8) * PITCH + (step * 2 + lane / 8 % 2) * 16);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    multiply_tiles(scores[m][i], queries[m][step], make_uint2(b.x, b.y));
                    multiply_tiles(scores[m][i + 1], queries[m][step], make_uint2(b.z, b.w));
                }
            }
        }
    }

    // Bias and mask, then the softmax's numerators; what was summed before is brought to the new maximum.
    //   line   of the bias: place 0 is that of the lane's first key and the first half's query of tile 0; hide: of the lane's first key
    __device__ __forceinline__ void weigh(float (&scores)[M_TILES][KEYS / 8][4], const float* line, const float* hide, float scale, bool hides)
    {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            float before[2] = {line[-16 * m - 8], line[-16 * m - 7]};  // eight queries on is eight keys back
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i) {
                float* own = scores[m][i];
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const float now = line[8 * i - 16 * m + k];
                    own[k] = own[k] * scale + now;
                    own[2 + k] = own[2 + k] * scale + before[k];
                    before[k] = now;
                }
            }
        }
        if (hides)  // one branch for all, as most tiles hide nothing
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
                for (int k = 0; k < 4; ++k)
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m)
                        scores[m][i][k] += hide[8 * i + k % 2];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            float most[2] = {largest[m][0], largest[m][1]};
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    most[k / 2] = fmaxf(most[k / 2], scores[m][i][k]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                most[half] = most_of_four(most[half]);
                const float factor = power_of_two(largest[m][half] - most[half]);
                largest[m][half] = most[half];
                float sum = 0.f;
#pragma unroll
                for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
                    for (int k = 2 * half; k < 2 * half + 2; ++k)
                        sum += scores[m][i][k] = power_of_two(scores[m][i][k] - most[half]);
                total[m][half] = total[m][half] * factor + sum;
#pragma unroll
                for (int i = 0; i < D_CHUNKS; ++i)
                    sums[m][i][2 * half] *= factor, sums[m][i][2 * half + 1] *= factor;
            }
        }
    }

    // Add the values; two accumulators of the scores are the A fragment of 16 queries and 16 keys.
    __device__ __forceinline__ void add_values(const float (&scores)[M_TILES][KEYS / 8][4], unsigned values, int lane)
    {
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            uint4 a[M_TILES];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                const float *first = scores[m][2 * step], *second = scores[m][2 * step + 1];
                a[m] = make_uint4(narrow_two(first[0], first[1]), narrow_two(first[2], first[3]), narrow_two(second[0], second[1]),
                                  narrow_two(second[2], second[3]));
            }
#pragma unroll
            for (int i = 0; i < D_CHUNKS; i += 2) {
                const uint4 b = load_transposed(values + (step * 16 + lane % 16) * PITCH + (i + lane / 16) * 16);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    multiply_tiles(sums[m][i], a[m], make_uint2(b.x, b.y));
                    multiply_tiles(sums[m][i + 1], a[m], make_uint2(b.z, b.w));
                }
            }
        }
    }

    // Results of the warp's queries, through its own part of shared memory so that they are written 16 bytes at a time.
    __device__ __forceinline__ void write(char* rows, stored* out, int query0, int length, int lane)
    {
        __syncwarp();
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float all = sum_lanes(total[m][half], 1, 4), factor = all > 0.f ? 1.f / all : 0.f;
                char* row = rows + (m * 16 + half * 8 + lane / 4) * PITCH + lane % 4 * 4;
#pragma unroll
                for (int i = 0; i < D_CHUNKS; ++i)
                    *(unsigned*)(row + i * 16) = narrow_two(sums[m][i][2 * half] * factor, sums[m][i][2 * half + 1] * factor);
            }
        __syncwarp();
        constexpr int WRITTEN = D / 8, ALL = M_TILES * 16 * WRITTEN;  // chunks of a row, of all
        for (int i = lane; i < ALL; i += 32) {
            const int row = i / WRITTEN, chunk = i % WRITTEN;
            if (query0 + row < length)
                *(uint4*)(out + (long long)(query0 + row) * HD + chunk * 8) = *(const uint4*)(rows + row * PITCH + chunk * 16);
        }
    }
};

// Grid (tiles of QUERIES, H, B), or (H, places): those without queries come last.
template <int M_TILES>
__device__ __forceinline__ void attend(const stored* qkv, const float* hide, const int* lists, const float* bias, stored* out, const int4* places,
                                       int length, int key_tiles, int limit)
{
    extern __shared__ __align__(16) char attention_memory[];
    typedef AttentionMemory<M_TILES> Memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int head = blockIdx.y, row = blockIdx.z, query0 = blockIdx.x * Memory::QUERIES;
    long long begin = (long long)row * length;  // the source's first token
    if (places) {
        const int4 place = places[blockIdx.y];
        head = blockIdx.x, begin = place.x, length = place.y, query0 = place.z, row = place.w;
        if (length == 0)
            return;
    }
    const int* list = lists + (long long)row * (key_tiles + 2);
    const int count = list[0];
    const bool uniform = list[1];
    list += 2;
    const unsigned memory = (unsigned)__cvta_generic_to_shared(attention_memory);
    const AttentionTiles<M_TILES> tiles = {qkv + begin * (3 * HD) + head * D, bias + head * (2 * limit + 1),
                                           hide + (long long)row * key_tiles * KEYS, memory, query0, length, limit, uniform};
    const int first = warp * M_TILES * 16;  // query of the warp within the CTA
    const float* line = (const float*)(attention_memory + Memory::BIAS) + Memory::QUERIES - 1 - first - lane / 4 + lane % 4 * 2;
    const float* own_hide = (const float*)(attention_memory + Memory::HIDE) + lane % 4 * 2;
    AttentionState<M_TILES> state;
    state.begin();
    int entry = count > 0 ? list[0] : 0, next = count > 1 ? list[1] : 0;
    tiles.copy_queries();
    if (count > 0)
        tiles.copy_keys(entry / 2, 0);
    end_group();
    for (int i = 0; i < count; ++i) {
        const int stage = i % 2, after = i + 2 < count ? list[i + 2] : 0;
        wait_for_group<0>();
        __syncthreads();  // this tile is there for all, and nobody reads the one before it any more
        if (i + 1 < count)
            tiles.copy_keys(next / 2, stage ^ 1);
        end_group();
        if (tiles.query0 + first < length) {
            float scores[M_TILES][KEYS / 8][4];
            if (i == 0)
                state.load_queries(memory + first * PITCH, lane);
            state.score(scores, memory + Memory::KEY_TILES + stage * Memory::TILE, lane);
            state.weigh(scores, line + stage * Memory::DISTANCES, own_hide + stage * KEYS, uniform ? 0.f : LOG2_E, entry % 2);
            state.add_values(scores, memory + Memory::VALUE_TILES + stage * Memory::TILE, lane);
        }
        entry = next, next = after;
    }
    if (count == 0) {  // of no token at all: the queries' copies must be over
        wait_for_group<0>();
        __syncthreads();
    }
    state.write(attention_memory + first * PITCH, out + begin * HD + head * D, tiles.query0 + first, length, lane);
}

// qkv [B][S][3][H][D]; hide float32 [B][key_tiles * 64] and lists int32 [B][key_tiles + 2] of `list_keys`; bias float32 [H][2 limit + 1], of
// key - query from -limit to limit, times log2(e); out [B][S][H][D]; places: null. Packed: qkv [T][3][H][D], out [T][H][D], places of
// `list_queries`, which `length` is not needed with; nothing is written for tokens of no source.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attend_encoder(const stored* qkv, const float* hide, const int* lists, const float* bias, stored* out, const int4* places, int length,
               int key_tiles, int limit)
{
    attend<1>(qkv, hide, lists, bias, out, places, length, key_tiles, limit);
}

// The same with as many queries of a CTA as fit: fewer reads of keys and values, and fewer CTAs.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attend_encoder_wide(const stored* qkv, const float* hide, const int* lists, const float* bias, stored* out, const int4* places, int length,
                    int key_tiles, int limit)
{
    attend<MOST_TILES>(qkv, hide, lists, bias, out, places, length, key_tiles, limit);
}

// Which keys of a source are to be looked at: those that the mask shows, or all tokens where it hides every one, with equal weights.
//   mask int64 [B][S], 0 hides a token, NO_KEY: there is none; hide float32 [B][key_tiles * 64], 0 or -inf;
//   lists int32 [B][key_tiles + 2]: number of tiles, whether weights are equal, then 2 * tile + (has it hidden keys);
//   starts: null, or of packed sources int64 [B + 1], the first token of each, and behind the last one's last; then mask is [T].
// Grid (B), a whole number of warps.
extern "C" __global__ void list_keys(const long long* mask, const long long* starts, float* hide, int* lists, int length, int key_tiles)
{
    long long begin = (long long)blockIdx.x * length;
    if (starts)
        begin = starts[blockIdx.x], length = starts[blockIdx.x + 1] - begin;
    mask += begin, hide += (long long)blockIdx.x * key_tiles * KEYS, lists += (long long)blockIdx.x * (key_tiles + 2);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = (length + KEYS - 1) / KEYS;
    bool shows = false;
    for (int i = threadIdx.x; i < length; i += blockDim.x)
        shows |= mask[i] != 0 && mask[i] != NO_KEY;
    const bool uniform = !__syncthreads_or(shows);
    for (int tile = warp; tile < tiles; tile += blockDim.x / 32) {
        bool used[2];
        for (int k = 0; k < 2; ++k) {
            const int key = tile * KEYS + k * 32 + lane;
            used[k] = key < length && mask[key] != NO_KEY && (uniform || mask[key] != 0);
            hide[key] = used[k] ? 0.f : -INFINITY;
        }
        const bool any = __any_sync(0xffffffffu, used[0] || used[1]), all = __all_sync(0xffffffffu, used[0] && used[1]);
        if (lane == 0)
            lists[2 + tile] = any ? 2 * tile + !all : -1;
    }
    __syncthreads();
    if (warp > 0)
        return;
    int count = 0;
    for (int tile0 = 0; tile0 < tiles; tile0 += 32) {
        const int entry = tile0 + lane < tiles ? lists[2 + tile0 + lane] : -1;
        const unsigned there = __ballot_sync(0xffffffffu, entry >= 0);  // all lanes have read before one writes
        if (entry >= 0)
            lists[2 + count + __popc(there & ((1u << lane) - 1))] = entry;
        count += __popc(there);
        __syncwarp();
    }
    if (lane == 0)
        lists[0] = count, lists[1] = uniform;
}

// Which queries each CTA of `attend_encoder` has of packed sources, one source after the other.
//   starts int64 [sources + 1], as of `list_keys`; queries: of a CTA; places [count]: a source's first token, its length (0: no source is left),
//   the first query in it, and its number
// Grid (count / 128), 128 threads.
extern "C" __global__ void list_queries(const long long* starts, int4* places, int sources, int count, int queries)
{
    const int place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= count)
        return;
    int4 found = make_int4(0, 0, 0, 0);
    for (int source = 0, left = place; source < sources; ++source) {
        const int begin = starts[source], length = starts[source + 1] - begin, tiles = (length + queries - 1) / queries;
        if (left >= 0 && left < tiles)
            found = make_int4(begin, length, left * queries, source);
        left -= tiles;
    }
    places[place] = found;
}
