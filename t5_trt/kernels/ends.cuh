// The two ends of a step: the embedding of the last token, and the output matrix with, if wanted, the best token.
#pragma once
#include "layers.cuh"
#include "warpgroup.cuh"

constexpr int EMBED_THREADS = 256;

// stream = factor * embedding[token], with what `add_product` leaves beside it; a CTA a row, half a warp for 16 columns at a time.
//   table [V'][E]; tokens int32 [rows]; stream float32 [rows][E_PAD]; copy, squares, scales as of `project_qkv`
extern "C" __global__ void __launch_bounds__(EMBED_THREADS)
embed(const stored* table, const int* tokens, float* stream, stored* copy, float* squares, float* scales, float factor)
{
    constexpr int ROUNDS = (E_PAD + EMBED_THREADS - 1) / EMBED_THREADS;
    __shared__ float sums[EMBED_THREADS / 32];
    let_next_start();
    wait_for_inputs();
    const int row = blockIdx.x;
    const stored* from = table + (long long)tokens[row] * E;
    float values[ROUNDS], all = 0.f;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = round * EMBED_THREADS + threadIdx.x;
        values[round] = i < E ? widen(from[i]) * factor : 0.f;
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = round * EMBED_THREADS + threadIdx.x;
        const float square = sum_lanes(values[round] * values[round], 1, 16);
        all += square;
        if (i < E_PAD)
            stream[(long long)row * E_PAD + i] = values[round];
        if ((i & 15) == 0 && i < E_PAD)
            squares[(long long)row * PARTIALS + i / 16] = square;
    }
    all = sum_lanes(all, 16, 32);
    if ((threadIdx.x & 31) == 0)
        sums[threadIdx.x >> 5] = all;
    __syncthreads();
    all = 0.f;
#pragma unroll
    for (int i = 0; i < EMBED_THREADS / 32; ++i)
        all += sums[i];
    const float scale = scale_for(rsqrtf(fmaxf(all / E, 1e-12f)));
    if (threadIdx.x == 0)
        scales[row] = scale;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = round * EMBED_THREADS + threadIdx.x;
        if (i < E_PAD)
            leave_copy(copy, row, i, values[round], scale);
    }
}

// What `best` holds for a token.
__device__ __forceinline__ unsigned long long ranked(float logit, int token, const unsigned char* hidden, bool hides)
{
    return ((unsigned long long)sortable(hides && hidden[token] ? -INFINITY : logit) << 32) | (unsigned)~token;
}

__device__ __forceinline__ bool hides_at(const unsigned char* hidden, const double* until, const int* position, int row, int rows)
{
    return hidden && row < rows && position[row] + 1 < *until;
}

// logits[row][out] = scale * W[out] norm(stream[row]). If `best` is given, it receives by atomicMax (sortable logit, ~token) of every row,
// so the lowest token wins a tie; it must be zero before. Tokens of `hidden` [V] (or null) count as -infinity in `best` where a row, with
// its token at `position`, has fewer than `until` tokens.
//   weights [V][E]; logits float32 [rows][V] or null; best uint64 [rows] or null; position int32 [rows]
#if STORAGE == FLOAT32
constexpr int HEAD_WIDE = 2, HEAD_ROWS = ROWS;
typedef Product<(V_TILES + 1) / 2 * 2, HEAD_WIDE, ROW_TILES, E_K, HEAD_WARPS, true> HeadProduct;
constexpr int HEAD_SHARED = HeadProduct::SHARED;

// Grid (pairs of output tiles, row groups).
extern "C" __global__ void __launch_bounds__(HEAD_WARPS * 32)
output_head(const uint4* weights, const stored* copy, const float* squares, const float* scales, float* logits, unsigned long long* best,
            const unsigned char* hidden, const double* until, const int* position, int rows, float epsilon, float scale)
{
    const auto before = [&](int, int row) { return hides_at(hidden, until, position, row, rows); };
    product<HeadProduct, HEAD_WIDE>(weights, copy, {squares, scales, nullptr, epsilon}, rows, before, [&](int first, int output, int row, const float* y, bool hides) {
        unsigned long long top = 0;
#pragma unroll
        for (int i = 0; i < HEAD_WIDE; ++i) {
            const int token = (first + i) * 16 + output;
            const float logit = y[i] * scale;
            if (token < V && row < rows) {
                if (logits)
                    logits[(long long)row * V + token] = logit;
                top = max(top, ranked(logit, token, hidden, hides));
            }
        }
        if (best) {
            for (int step = 1; step < 16; step <<= 1)
                top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
            if (output == 0 && row < rows)
                atomicMax(best + row, top);
        }
    });
}
#else
// k tiles whose weights are in registers, and whose rows are copied together
constexpr int HEAD_STEP = least(HEAD_WARPS > 8 || (INT8 && HEAD_ROW_TILES > 2) ? 8 : 16, HEAD_ROOM / (3 * HEAD_ROW_TILES * BLOCK));
constexpr int HEAD_WIDE = HEAD_WARPS, HEAD_ROWS = HEAD_ROW_TILES * 8;
constexpr int HEAD_STEPS = (E_K + HEAD_STEP - 1) / HEAD_STEP, HEAD_SLOT = HEAD_ROW_TILES * HEAD_STEP * BLOCK;
constexpr int HEAD_DEPTH = least(HEAD_STEPS, HEAD_ROOM / HEAD_SLOT);                // steps that shared memory holds
constexpr int HEAD_LEAD = HEAD_STEPS > HEAD_DEPTH ? HEAD_DEPTH - 1 : HEAD_DEPTH;  // of which so many are on their way
// Many rows hand over their logits row by row, from shared memory in place of the rows' copy: [row][token], and no bank conflicts.
constexpr bool HEAD_BY_ROWS = HEAD_ROW_TILES > 8;
constexpr int HEAD_AT_ONCE = least(4, HEAD_ROWS / HEAD_WARPS);  // rows that a warp then has at once
constexpr int HEAD_TOKENS = HEAD_WARPS * 16, HEAD_STRIDE = HEAD_TOKENS + 4;
constexpr int HEAD_SHARED = most(HEAD_DEPTH * HEAD_SLOT, HEAD_BY_ROWS ? HEAD_ROWS * HEAD_STRIDE * 4 : 0);
static_assert(HEAD_LEAD > 0, "shared memory of output_head");

// Start to copy a step of the CTA's rows into shared memory.
__device__ __forceinline__ void copy_head_rows(int step, const stored* copy, int row0, int rows)
{
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared) + step % HEAD_DEPTH * HEAD_SLOT;
    copy_row_tiles<HEAD_WARPS * 32, HEAD_ROW_TILES, HEAD_STEP, E_K>(to, copy, 0, step * HEAD_STEP, row0, rows, threadIdx.x);
}

// The loads of a step's weights follow one another slowly; so all of them are on their way to the L2 cache before.
__device__ __forceinline__ void ask_for_step(const uint4* weights, int k_tiles, int lane)
{
#pragma unroll
    for (int line = 0; line < HEAD_STEP * 4; line += 32)
        if (line + lane < k_tiles * 4)
            prefetch(weights + (line + lane) * 8);
}

// Multiply a step's k tiles, from `base` on, by the rows at `rows`; load(i) loads the weights of the next step in place of k tile `i`.
template <class Load>
__device__ __forceinline__ void multiply_head_step(int base, const char* rows, const uint4* held, float (*sums)[4], int lane, Load load)
{
#if WARPGROUPS
    const unsigned long long x = describe_rows(rows, HEAD_STEP * BLOCK);
#pragma unroll
    for (int i = 0; i < HEAD_STEP; ++i) {
        if (E_K % HEAD_STEP == 0 || base + i < E_K) {
            begin_products();
            multiply_group<HEAD_ROWS, true>(sums[0], held[i], x + i * (BLOCK / 16));
            end_products();
        }
        if (i > 0) {
            wait_for_products<1, 0>(nullptr);
            load(i - 1);
        }
    }
    wait_for_products<0, HEAD_ROWS / 2>(sums[0]);
    load(HEAD_STEP - 1);
#else
    const Rows* x = (const Rows*)rows + lane;
#pragma unroll
    for (int i = 0; i < HEAD_STEP; ++i) {
        if (E_K % HEAD_STEP == 0 || base + i < E_K) {
            const Factor a(held[i]);
#pragma unroll
            for (int t = 0; t < HEAD_ROW_TILES; ++t)
                multiply_tiles(sums[t], a, x[(t * HEAD_STEP + i) * 32]);
        }
        load(i);
    }
#endif
}

// What `output_head` is given beside its product, see above.
struct HeadOutput {
    float* logits;
    unsigned long long* best;
    const unsigned char* hidden;
    const double* until;
    const int* position;
    int row0, rows;
};

// The logit of a lane's sum `i` of row tile `t`: its row, output and value.
struct HeadLogit { int local, output; float value; };
__device__ __forceinline__ HeadLogit head_logit(const float (*sums)[4], int t, int i, const float* factors, float scale, const float* output_scales)
{
    const int lane = threadIdx.x & 31, local = t * 8 + (lane & 3) * 2 + (i & 1);
    return {local, (lane >> 2) + (i & 2) * 4, sums[t][i] * (factors[local] * scale) * output_scales[i >> 1]};
}

// Few rows: logits straight from registers, best tokens of a warp's tile, then of the CTA.
__device__ __forceinline__ void leave_tiles(const HeadOutput& to, const float (*sums)[4], const float* factors, float scale, const float* output_scales)
{
    __shared__ unsigned long long tops[HEAD_WARPS][HEAD_ROWS];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, tile = blockIdx.x * HEAD_WARPS + warp;
#pragma unroll
    for (int t = 0; t < HEAD_ROW_TILES; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // the two rows of this lane
            const int local = t * 8 + (lane & 3) * 2 + j, row = to.row0 + local;
            const bool hides = hides_at(to.hidden, to.until, to.position, row, to.rows);
            unsigned long long top = 0;
#pragma unroll
            for (int i = j; i < 4; i += 2) {  // and its two outputs
                const HeadLogit own = head_logit(sums, t, i, factors, scale, output_scales);
                const int token = tile * 16 + own.output;
                if (token < V && row < to.rows) {
                    if (to.logits)
                        to.logits[(long long)row * V + token] = own.value;
                    top = max(top, ranked(own.value, token, to.hidden, hides));
                }
            }
            if (!to.best)
                continue;
#pragma unroll
            for (int step = 4; step < 32; step <<= 1)
                top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
            if (lane < 4)
                tops[warp][local] = top;
        }
    if (!to.best)
        return;
    __syncthreads();
    if (threadIdx.x < HEAD_ROWS && to.row0 + threadIdx.x < to.rows) {
        unsigned long long top = 0;
#pragma unroll
        for (int i = 0; i < HEAD_WARPS; ++i)
            top = max(top, tops[i][threadIdx.x]);
        atomicMax(to.best + to.row0 + threadIdx.x, top);
    }
}

// Four neighbouring logits, of tokens from `token` on, in memory, if there are such tokens.
__device__ __forceinline__ void leave_logits(float* logits, int token, const float4& four)
{
    if (V % 4 == 0) {
        if (V % HEAD_TOKENS == 0 || token < V)
            *(float4*)(logits + token) = four;
        return;
    }
    const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (token + i < V)
            logits[token + i] = values[i];
}

// Hide those that `hidden` says: a byte for every token.
__device__ __forceinline__ void hide(float4& four, const unsigned char* hidden, int token)
{
    const auto hides = [&](int i) { return token + i < V && hidden[token + i]; };
    four = {hides(0) ? -INFINITY : four.x, hides(1) ? -INFINITY : four.y, hides(2) ? -INFINITY : four.z, hides(3) ? -INFINITY : four.w};
}

// The largest of what a lane has of a row's logits: its key, and its token, counted from the lane's first one.
struct Top { unsigned key, token; };

// Logits of HEAD_AT_ONCE rows in shared memory, every HEAD_WARPS-th from `local` on, by a warp, which then waits once for all of them.
__device__ __forceinline__ void leave_rows(const HeadOutput& to, const float* made, const bool* hides, int local)
{
    constexpr int FOURS = HEAD_TOKENS / 128;
    const int lane = threadIdx.x & 31, first = blockIdx.x * HEAD_TOKENS + lane * 4;
    float4 values[HEAD_AT_ONCE][FOURS];
    Top tops[HEAD_AT_ONCE];
#pragma unroll
    for (int r = 0; r < HEAD_AT_ONCE; ++r)
#pragma unroll
        for (int i = 0; i < FOURS; ++i)
            values[r][i] = *(const float4*)(made + (local + r * HEAD_WARPS) * HEAD_STRIDE + i * 128 + lane * 4);
#pragma unroll
    for (int r = 0; r < HEAD_AT_ONCE; ++r) {
        const int own = local + r * HEAD_WARPS, row = to.row0 + own;
#pragma unroll
        for (int i = 0; i < FOURS; ++i) {
            if (to.logits && row < to.rows)
                leave_logits(to.logits + (long long)row * V, first + i * 128, values[r][i]);
            if (to.hidden && hides[own])
                hide(values[r][i], to.hidden, first + i * 128);
        }
        tops[r] = {0, 0};
#pragma unroll
        for (int i = 0; i < FOURS; ++i) {
            const float four[4] = {values[r][i].x, values[r][i].y, values[r][i].z, values[r][i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned key = sortable(four[j]);
                if (key > tops[r].key)
                    tops[r] = {key, (unsigned)(i * 128 + j)};
            }
        }
    }
    if (!to.best)
        return;
    unsigned most[HEAD_AT_ONCE], lowest[HEAD_AT_ONCE];
#pragma unroll
    for (int r = 0; r < HEAD_AT_ONCE; ++r)
        most[r] = lanes_max(tops[r].key);
#pragma unroll
    for (int r = 0; r < HEAD_AT_ONCE; ++r)
        lowest[r] = lowest_with(most[r], tops[r].key, first + tops[r].token);
#pragma unroll
    for (int r = 0; r < HEAD_AT_ONCE; ++r)
        if (lane == r && to.row0 + local + r * HEAD_WARPS < to.rows)
            atomicMax(to.best + to.row0 + local + r * HEAD_WARPS, ((unsigned long long)most[r] << 32) | ~lowest[r]);
}

// A warp makes a tile of 16 outputs with all of k, from a copy of the stream in shared memory. Grid (HEAD_WARPS output tiles, groups of HEAD_ROWS).
extern "C" __global__ void __launch_bounds__(HEAD_WARPS * 32)
output_head(const uint4* weights, const stored* copy, const float* squares, const float* scales, float* logits, unsigned long long* best,
            const unsigned char* hidden, const double* until, const int* position, int rows, float epsilon, float scale)
{
    __shared__ float factors[HEAD_ROWS];
    __shared__ bool hides[HEAD_BY_ROWS ? HEAD_ROWS : 1];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, tile = blockIdx.x * HEAD_WARPS + warp, row0 = blockIdx.y * HEAD_ROWS;
    const bool has = tile < V_TILES;
    const uint4* own = count_from(weights_at<E_K>(weights, tile, 0) + lane);
    uint4 held[HEAD_STEP];
#pragma unroll
    for (int i = 0; i < HEAD_STEP; ++i)
        if (has && i < E_K)
            held[i] = load_weights(own + i * WEIGHT_PIECES, true);
    float output_scales[2] = {1.f, 1.f};  // of this lane's outputs
#if INT8
    if (has)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            output_scales[i] = ((const float*)weights_at<E_K>(weights, tile, E_K))[(lane >> 2) + i * 8];
#endif
    let_next_start();
    NormFactors<HEAD_WARPS * 32, HEAD_ROWS> of_norm({squares, scales, nullptr, epsilon}, row0, rows);
    constexpr bool LATE = decltype(of_norm)::LATE;
    wait_for_inputs();
    of_norm.load();
#pragma unroll
    for (int step = 0; step < HEAD_LEAD; ++step) {
        copy_head_rows(step, copy, row0, rows);
        end_group();
    }
    if (!LATE)
        of_norm.leave(factors);
    if (HEAD_BY_ROWS && threadIdx.x < HEAD_ROWS)
        hides[threadIdx.x] = hides_at(hidden, until, position, row0 + threadIdx.x, rows);
    float sums[HEAD_ROW_TILES][4] = {};
#pragma unroll 1
    for (int step = 0; step < HEAD_STEPS; ++step) {
        const int base = step * HEAD_STEP;
        wait_for_group<HEAD_LEAD - 1>();
#if WARPGROUPS
        show_to_products();
#endif
        __syncthreads();  // other threads have copied a part, and are done with the step before
        if (HEAD_STEPS > HEAD_DEPTH && step + HEAD_LEAD < HEAD_STEPS)
            copy_head_rows(step + HEAD_LEAD, copy, row0, rows);
        end_group();  // an empty one, too: the wait counts groups
        if (HEAD_ASKS && has && base + HEAD_STEP < E_K)
            ask_for_step(weights_at<E_K>(weights, tile, base + HEAD_STEP), least(HEAD_STEP, E_K - base - HEAD_STEP), lane);
        multiply_head_step(base, shared + step % HEAD_DEPTH * HEAD_SLOT, held, sums, lane, [&](int i) {
            if (has && base + i + HEAD_STEP < E_K)
                held[i] = load_weights(own + base * WEIGHT_PIECES + (i + HEAD_STEP) * WEIGHT_PIECES, false);
        });
    }
    if (LATE)
        of_norm.leave(factors);
    __syncthreads();  // the factors are there, and no warp reads the copy of the rows any more
    const HeadOutput to = {logits, best, hidden, until, position, row0, rows};
    if constexpr (!HEAD_BY_ROWS) {
        leave_tiles(to, sums, factors, scale, output_scales);
        return;
    }
    // a warp has a whole row of the CTA's logits at once, so that the code for the best token is there once and not for every row tile
    float* made = (float*)shared;
#pragma unroll
    for (int t = 0; t < HEAD_ROW_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const HeadLogit own = head_logit(sums, t, i, factors, scale, output_scales);
            const bool there = V % HEAD_TOKENS == 0 || tile * 16 + own.output < V;
            made[own.local * HEAD_STRIDE + warp * 16 + own.output] = there ? own.value : -INFINITY;
        }
    __syncthreads();
#pragma unroll 1
    for (int local = warp; local < HEAD_ROWS; local += HEAD_AT_ONCE * HEAD_WARPS)
        leave_rows(to, made, hides, local);
}
#endif
