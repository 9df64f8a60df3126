// Cross-attention of rows that share a source (beams, positions) by the tensor cores: half precision, d_kv of 64 or 128. Everything else is
// attention.cuh's.
//
// A CTA takes CHUNK keys of one head for up to four rows; a warp takes every SHARED_WARPS-th tile of 16 keys. Its lanes read keys and values
// from memory as fragments of mma.m16n8k16: both products have 16 keys on one side, and on the other two columns for each row, because what
// is not stored in half precision is split into two halves, its rounded value and the rest. So a sum has the digits of float32 factors, and
// four rows cost what one does. A column does not depend on the others, and the warps' sums are added up in their order: the bits do not
// depend on the number of rows.
//
// Lane l is in group l / 4 and has place l % 4. Of a key it reads the vector `place` of every 32 columns, of a value the vector `group` of
// every 64: any order of columns is as good as another, as long as both sides of a product have the same.
#pragma once
#include "attention_chunks.cuh"
#include "tensor_cores.cuh"

constexpr int KEY_TILE = 16, SHARERS = 4;
// all keys and values of a warp are on their way at once: as many as registers hold
constexpr int SHARED_WARPS = D == 64 ? 4 : 8, OWN_TILES = CHUNK / KEY_TILE / SHARED_WARPS;
static_assert(D == 64 || D == 128, "d_kv");

struct TileSums { float largest, total; };
struct WarpSums { TileSums of[SHARED_WARPS][SHARERS]; float values[SHARED_WARPS][SHARERS][D]; };  // what warps leave for each row

__device__ __forceinline__ unsigned word(const uint4& vector, int i) { return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w; }

__device__ __forceinline__ unsigned narrow_finite(float low, float high)
{
    return STORAGE == FLOAT16 ? narrow_two(fminf(fmaxf(low, -65504.f), 65504.f), fminf(fmaxf(high, -65504.f), 65504.f)) : narrow_two(low, high);
}

// Two numbers as `stored`, or what is lost by that. In float16 both stay finite.
__device__ __forceinline__ unsigned split(float low, float high, bool rest)
{
    const unsigned both = narrow_finite(low, high);
    return rest ? narrow_finite(low - widen((stored)(both & 0xffff)), high - widen((stored)(both >> 16))) : both;
}

// A warp's tiles of a chunk.
struct KeyTiles {
    int first, group, place;  // the first key of the first tile; of this lane
    int own, end;             // how many tiles there are, and the first key that does not count
    uint4 key[OWN_TILES][2][D / 32], value[OWN_TILES][4][D / 64];
    float score[OWN_TILES][2];
    unsigned query[D / 32][2][2];

    // This lane's keys of a tile are `key_at`, its values those of the keys `value_at`.
    __device__ __forceinline__ int tile_start(int tile) const { return first + tile * SHARED_WARPS * KEY_TILE; }
    __device__ __forceinline__ int key_at(int tile, int half) const { return tile_start(tile) + group + half * 8; }
    __device__ __forceinline__ int value_at(int tile, int i) const { return tile_start(tile) + place * 2 + (i & 1) + (i >> 1) * 8; }

    __device__ __forceinline__ void load(const char* keys, const char* values, const float* bias)
    {
#pragma unroll
        for (int tile = 0; tile < OWN_TILES; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = key_at(tile, half);
                const uint4* from = (const uint4*)(keys + (unsigned)at * KEY_BYTES) + place;
#pragma unroll
                for (int i = 0; i < D / 32; ++i)
                    key[tile][half][i] = at < end ? __ldcg(from + i * 4) : uint4{};
                score[tile][half] = at < end ? bias[at] * LOG2E : -INFINITY;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4* from = (const uint4*)(values + (unsigned)value_at(tile, i) * KEY_BYTES) + group;
#pragma unroll
                for (int j = 0; j < D / 64; ++j)
                    value[tile][i][j] = value_at(tile, i) < end ? __ldcg(from + j * 8) : uint4{};
            }
        }
    }

    // B fragments of a row's query times LOG2E: its rounded values in even groups, the rest in odd ones.
    __device__ __forceinline__ void load_query(const float* from)
    {
#pragma unroll
        for (int i = 0; i < D / 32; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 four = __ldcg((const float4*)(from + i * 32 + place * 8) + half);
                query[i][half][0] = split(LOG2E * four.x, LOG2E * four.y, group & 1);
                query[i][half][1] = split(LOG2E * four.z, LOG2E * four.w, group & 1);
            }
    }

    // The scores of this lane's keys for row `place`, and the largest one of the warp's.
    __device__ __forceinline__ float multiply_keys()
    {
        float largest = HIDDEN;
#pragma unroll
        for (int tile = 0; tile < OWN_TILES; ++tile) {
            if (tile >= own)
                break;
            float sums[2][4] = {};
#pragma unroll
            for (int i = 0; i < D / 32; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint4 &low = key[tile][0][i], &high = key[tile][1][i];
                    const uint4 a = {word(low, half * 2), word(high, half * 2), word(low, half * 2 + 1), word(high, half * 2 + 1)};
                    multiply_tiles(sums[half], a, {query[i][half][0], query[i][half][1]});
                }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                score[tile][half] += (sums[0][half * 2] + sums[1][half * 2]) + (sums[0][half * 2 + 1] + sums[1][half * 2 + 1]);
                largest = fmaxf(largest, score[tile][half]);
            }
        }
#pragma unroll
        for (int step = 4; step < 32; step <<= 1)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        return largest;
    }

    // Add a tile's values, weighted by exp2 of the scores, to the sums of columns 64 i + 8 group + 2 j and the next: [i][j], first both
    // halves of the one, then of the other. Returns the sum of this lane's weights.
    __device__ __forceinline__ float multiply_values(int tile, float largest, float (&sums)[D / 64][4][4])
    {
        float total = 0.f;
        unsigned weights[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float weight = exp2_fast(score[tile][half] - largest);
            total += weight;
            weights[half] = narrow_two(weight, weight - widen(narrow(weight)));
        }
        const int from = place * 8 + (group >> 1);  // the lane that has the first of this lane's values' keys, for this lane's column
        const unsigned which = group & 1 ? 0x7632 : 0x5410;
        uint2 b;
        b.x = __byte_perm(__shfl_sync(0xffffffffu, weights[0], from), __shfl_sync(0xffffffffu, weights[0], from + 4), which);
        b.y = __byte_perm(__shfl_sync(0xffffffffu, weights[1], from), __shfl_sync(0xffffffffu, weights[1], from + 4), which);
#pragma unroll
        for (int i = 0; i < D / 64; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned two[4] = {word(value[tile][0][i], j), word(value[tile][1][i], j), word(value[tile][2][i], j), word(value[tile][3][i], j)};
                const uint4 a = {__byte_perm(two[0], two[1], 0x5410), __byte_perm(two[0], two[1], 0x7632), __byte_perm(two[2], two[3], 0x5410),
                                 __byte_perm(two[2], two[3], 0x7632)};
                multiply_tiles(sums[i][j], a, b);
            }
        return total;
    }

    // Leave the warp's sums for `rows` rows.
    __device__ __forceinline__ void leave(int warp, int rows, WarpSums& all)
    {
        const float largest = multiply_keys();
        float sums[D / 64][4][4] = {}, total = 0.f;
#pragma unroll
        for (int tile = 0; tile < OWN_TILES; ++tile)
            if (tile < own)
                total += multiply_values(tile, largest, sums);
        total = sum_lanes(total, 4, 32);
        if (place >= rows)
            return;
        if (group == 0)
            all.of[warp][place] = {largest, total};
#pragma unroll
        for (int i = 0; i < D / 64; ++i)
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const float(&a)[4] = sums[i][j], (&b)[4] = sums[i][j + 1];
                *(float4*)(all.values[warp][place] + i * 64 + group * 8 + j * 2) = {a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
            }
    }
};

// Add up what `warps` warps left, and store the result of `rows` rows from `row` on, or what the chunk knows of it.
__device__ __forceinline__ void merge_warps(const WarpSums& all, int warps, int count, int row, int rows, stored* attended, float* parts,
                                            int* arrived)
{
    const int chunks = (count + CHUNK - 1) / CHUNK, pairs = rows * D / 2;
    for (int i = threadIdx.x; i < pairs; i += SHARED_WARPS * 32) {
        const int own = i / (D / 2), column = i % (D / 2) * 2;
        TileSums merged = {HIDDEN, 0.f};
        float low = 0.f, high = 0.f;
#pragma unroll
        for (int w = 0; w < SHARED_WARPS; ++w)
            if (w < warps)
                merged.largest = fmaxf(merged.largest, all.of[w][own].largest);
#pragma unroll
        for (int w = 0; w < SHARED_WARPS; ++w)
            if (w < warps) {
                const float factor = exp2_fast(all.of[w][own].largest - merged.largest);
                merged.total = fmaf(factor, all.of[w][own].total, merged.total);
                low = fmaf(factor, all.values[w][own][column], low), high = fmaf(factor, all.values[w][own][column + 1], high);
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
        add_chunks<SHARED_WARPS * 32>(parts, chunks, row, rows, attended, arrived);
}

// As `attend_cross` in attention.cuh. Grid (H, sources times ceil(beams / SHARERS), chunks).
extern "C" __global__ void __launch_bounds__(SHARED_WARPS * 32, SHARED_WARPS == 4 ? 4 : 1)
attend_shared(const float* query, const stored* keys, const stored* values, const float* mask, const int* lengths, stored* attended,
              float* parts, int* arrived, int capacity, int width, int beams)
{
    __shared__ WarpSums all;
    const int shares = (beams + SHARERS - 1) / SHARERS, source = blockIdx.y / shares, first = blockIdx.y % shares * SHARERS;
    const int row = source * beams + first, rows = min(beams - first, SHARERS);
    const int count = lengths[source], start = blockIdx.z * CHUNK;
    if (start >= count && start > 0)  // not the first chunk of a source that has no keys
        return let_next_start();
    KeyTiles work;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);  // the compiler does not know that a warp's lanes have the same
    work.first = start + warp * KEY_TILE, work.end = min(count, start + CHUNK);
    work.group = (threadIdx.x & 31) >> 2, work.place = threadIdx.x & 3;
    const int tiles_here = (work.end - start + KEY_TILE - 1) / KEY_TILE;
    work.own = max(0, (tiles_here - warp + SHARED_WARPS - 1) / SHARED_WARPS);
    const unsigned head_bytes = blockIdx.x * capacity * KEY_BYTES, row_bytes = H * capacity * KEY_BYTES;
    work.load(further((const char*)keys + head_bytes, source, row_bytes), further((const char*)values + head_bytes, source, row_bytes),
              mask + source * (long long)width);
    let_next_start();
    wait_for_inputs();
    if (work.own) {
        work.load_query(query + (long long)(row + min(work.group >> 1, rows - 1)) * HD_PAD + blockIdx.x * D);
        work.leave(warp, rows, all);
    }
    __syncthreads();
    merge_warps(all, min(tiles_here, SHARED_WARPS), count, row, rows, attended, parts, arrived);
}
