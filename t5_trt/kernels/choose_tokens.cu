// The choice of a token for every row: the best one, or one drawn after temperature, top-k and top-p.
//
// One CTA for a row, all of whose sums are added in a fixed order: a row depends on no other row. What Transformers' TemperatureLogitsWarper,
// TopKLogitsWarper and TopPLogitsWarper keep is kept here, but for a token at the very edge of top-p, as sums are rounded differently. Draws are those of
// `torch.multinomial`: the largest p / variate. Tokens are few after top-k, and mostly after top-p: they are listed in shared memory and sorted there.
// Where they are not, thresholds are found by bisection over all scores.
//   scores float32 [.][vocabulary]; variates float32 likewise, or null: those of `torch.Tensor.exponential_` for [1][vocabulary] and the row's generator,
//   by `spread` threads; chosen int64 [.]
#include "token_rules.cuh"

constexpr int WARPS = 32;     // at most, of a CTA
constexpr int LISTED = 2048;  // tokens at most
constexpr int FEW = 512, SOME = 256;  // the largest top-k for a list, and how many of the best threads' tokens it has without top-k
constexpr int TOKEN_BITS = 20;        // of a vocabulary

struct Best { float value; int token; };
__device__ inline Best better(const Best& a, const Best& b)
{
    return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a;
}

__device__ inline float sum_of_block(float own)
{
    __shared__ float sums[WARPS];
    for (int step = 1; step < LANES; step <<= 1)
        own += __shfl_xor_sync(0xffffffffu, own, step);
    __syncthreads();  // the sum before has been read
    if (threadIdx.x % LANES == 0)
        sums[threadIdx.x / LANES] = own;
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < blockDim.x / LANES; ++i)
        sum += sums[i];
    return sum;
}

__device__ inline Best best_of_block(Best own)
{
    __shared__ Best found[WARPS];
    for (int step = 1; step < LANES; step <<= 1)
        own = better(own, {__shfl_xor_sync(0xffffffffu, own.value, step), __shfl_xor_sync(0xffffffffu, own.token, step)});
    __syncthreads();
    if (threadIdx.x % LANES == 0)
        found[threadIdx.x / LANES] = own;
    __syncthreads();
    own = found[0];
    for (int i = 1; i < blockDim.x / LANES; ++i)
        own = better(own, found[i]);
    return own;
}

// The scores of a row, divided by the temperature. Each thread goes over the same ones every time.
struct Scores {
    const float* own;
    float temperature;
    int count;

    __device__ float at(float score) const { return divided(score, temperature); }
    template <int UNROLLED = 1, class Of> __device__ void each(Of of) const
    {
        if (count % 4 == 0)
#pragma unroll UNROLLED
            for (int i = threadIdx.x * 4; i < count; i += blockDim.x * 4) {
                const float4 four = *(const float4*)(own + i);
                of(at(four.x), i), of(at(four.y), i + 1), of(at(four.z), i + 2), of(at(four.w), i + 3);
            }
        else
            for (int i = threadIdx.x; i < count; i += blockDim.x)
                of(at(own[i]), i);
    }
};

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four numbers of 32 bits for a counter and a key.
__device__ inline void philox(unsigned (&words)[4], unsigned key, unsigned high_key)
{
    for (int round = 0; round < 10; ++round, key += 0x9E3779B9u, high_key += 0xBB67AE85u) {
        const unsigned long long a = (unsigned long long)words[0] * 0xD2511F53u, b = (unsigned long long)words[2] * 0xCD9E8D57u;
        const unsigned next[4] = {(unsigned)(b >> 32) ^ words[1] ^ key, (unsigned)b, (unsigned)(a >> 32) ^ words[3] ^ high_key, (unsigned)a};
        for (int i = 0; i < 4; ++i)
            words[i] = next[i];
    }
}

// A row's exponential variates.
struct Variates {
    const float* given;
    unsigned long long seed, offset;
    int spread;

    // Of torch's kernel, thread `element % spread` draws four numbers at a time, for elements `spread` apart
    // (distribution_elementwise_grid_stride_kernel in aten/src/ATen/native/cuda/DistributionTemplates.h; curand_uniform4; exponential in
    // aten/src/ATen/core/TransformationHelper.h).
    __device__ float of(int element) const
    {
        if (given)
            return given[element];
        const unsigned long long drawn = offset / 4 + element / (4 * spread);
        unsigned words[4] = {(unsigned)drawn, (unsigned)(drawn >> 32), (unsigned)(element % spread), 0};
        philox(words, (unsigned)seed, (unsigned)(seed >> 32));
        const int which = element / spread % 4;
        const unsigned word = which == 0 ? words[0] : which == 1 ? words[1] : which == 2 ? words[2] : words[3];
        const float uniform = word * 0x1p-32f + 0x1p-33f;
        return uniform >= 1.f - 0x1p-24f ? 0x1p-24f : -__logf(uniform);
    }
};

// Tokens by falling scores, of equal ones the last first, as a stable sort by rising scores has them from its end.
struct List { float scores[LISTED]; int tokens[LISTED]; };

// The largest key that at least `wanted` threads reach.
__device__ inline unsigned reached_by(unsigned own, int wanted)
{
    unsigned least = 0;
    for (unsigned bit = 0x80000000u; bit; bit >>= 1)
        if (__syncthreads_count(own >= (least | bit)) >= wanted)
            least |= bit;
    return least;
}

// Sorts the `count` tokens of a list; a barrier follows.
__device__ inline void sort(const List& from, List& to, int count)
{
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const float score = from.scores[i];
        const int token = from.tokens[i];
        int rank = 0;
        for (int j = 0; j < count; ++j)
            rank += from.scores[j] > score || (from.scores[j] == score && from.tokens[j] > token);
        to.scores[rank] = score, to.tokens[rank] = token;
    }
    __syncthreads();
}

// Draw from a sorted list: `outside` is the sum of the weights of tokens that are not in it, a token's weight being exp(its score - the largest one).
// -1 if top-p may go beyond the list.
__device__ inline int draw_from(List& list, int count, float outside, const Rules& rules, const Variates& variates)
{
    if (rules.top_k > 0 && rules.top_k < count) {
        const float least = list.scores[rules.top_k - 1];
        int kept = (int)rules.top_k;
        while (kept < count && list.scores[kept] == least)
            ++kept;
        count = kept;
    }
    const float largest = list.scores[0];
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        list.scores[i] = expf(list.scores[i] - largest);
    __syncthreads();
    float total = outside, sum = outside;
    for (int i = count - 1; i >= 0; --i)
        total += list.scores[i];
    if (rules.top_p < 1.) {
        const float edge = (float)(1. - rules.top_p);
        int kept = count;
        for (int i = count - 1; i > 0 && kept == i + 1; --i) {
            sum += list.scores[i];
            if (sum / total <= edge)
                kept = i;
        }
        if (kept == count && outside > 0.f && count > 1)
            return -1;
        count = kept, total = 0.f;
        for (int i = count - 1; i >= 0; --i)
            total += list.scores[i];
    }
    Best own = {-1.f, list.tokens[0]};
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        own = better(own, {list.scores[i] / total / variates.of(list.tokens[i]), list.tokens[i]});
    return best_of_block(own).token;
}

// The place of a token in the order of the list, from its end.
typedef unsigned long long Place;
__device__ inline Place place_in_order(float score, int token) { return (Place)sortable(score) << TOKEN_BITS | token; }

// The weights of the tokens from one place to another, both included.
__device__ inline float sum_between(const Scores& scores, float largest, Place from, Place to)
{
    float sum = 0.f;
    scores.each([&](float score, int token) {
        const Place place = place_in_order(score, token);
        if (place >= from && place <= to)
            sum += expf(score - largest);
    });
    return sum_of_block(sum);
}

// The largest key that at least `wanted` scores reach.
__device__ inline unsigned reached_by_scores(const Scores& scores, long long wanted)
{
    unsigned least = 0;
    for (unsigned bit = 0x80000000u; bit; bit >>= 1) {
        int count = 0;
        scores.each([&](float score, int) { count += sortable(score) >= (least | bit); });
        if (sum_of_block((float)count) >= wanted)
            least |= bit;
    }
    return least;
}

// Draw from all scores.
__device__ inline int draw_from_all(const Scores& scores, float largest, const Rules& rules, const Variates& variates)
{
    const unsigned finite = sortable(-INFINITY) + 1, reached = rules.top_k > 0 ? reached_by_scores(scores, rules.top_k) : 0;
    Place from = (Place)(reached > finite ? reached : finite) << TOKEN_BITS;
    int own_last = 0;  // the last of the best tokens, which always stays
    scores.each([&](float score, int token) { own_last = score == largest ? token : own_last; });
    const Place last = place_in_order(largest, (int)best_of_block({(float)own_last, 0}).value);
    float total = sum_between(scores, largest, from, last);
    if (rules.top_p < 1.) {
        const float edge = (float)(1. - rules.top_p);
        Place removed = 0;
        for (Place bit = 1ull << (32 + TOKEN_BITS - 1); bit; bit >>= 1)
            if (sum_between(scores, largest, from, removed | bit) / total <= edge)
                removed |= bit;
        from = removed >= last ? last : removed + 1 > from ? removed + 1 : from;
        total = sum_between(scores, largest, from, last);
    }
    Best own = {-1.f, scores.count};
    scores.each([&](float score, int token) {
        if (place_in_order(score, token) >= from)
            own = better(own, {expf(score - largest) / total / variates.of(token), token});
    });
    return best_of_block(own).token;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) choose_tokens(
    const float* scores, const Rules* rules, const float* variates, long long* chosen, int by_row, int vocabulary, int spread)
{
    __shared__ List found, sorted;
    __shared__ int listed;
    let_next_start();
    wait_for_inputs();
    const Rules& own = own_rules(rules, by_row);
    const long long place = place_of(own);
    const Scores row = {scores + place * vocabulary, (float)own.temperature, vocabulary};
    const Variates drawn = {variates ? variates + place * vocabulary : nullptr, own.seed, own.offset, spread};
    Best best = {-INFINITY, 0};
    row.each<4>([&](float score, int token) { best = score > best.value ? Best{score, token} : best; });
    const unsigned largest_key = sortable(best.value);
    if (threadIdx.x == 0)
        listed = 0;
    best = best_of_block(best);
    int token = best.token;
    if (own.draws && best.value > -INFINITY) {
        token = -1;
        const bool narrows = own.top_k > 0 || own.top_p < 1.;
        const int wanted = own.top_k > 0 ? (int)(own.top_k < vocabulary ? own.top_k : vocabulary) : SOME;
        if (narrows && wanted <= FEW) {
            const unsigned least = reached_by(largest_key, wanted);
            float outside = 0.f;
            row.each<4>([&](float score, int id) {
                if (sortable(score) >= least && score > -INFINITY) {
                    const int at = atomicAdd(&listed, 1);
                    if (at < LISTED)
                        found.scores[at] = score, found.tokens[at] = id;
                } else if (own.top_k <= 0)
                    outside += expf(score - best.value);
            });
            outside = sum_of_block(outside);  // and the list is there
            if (listed <= LISTED) {
                sort(found, sorted, listed);
                token = draw_from(sorted, listed, outside, own, drawn);
            }
        }
        if (token < 0)
            token = draw_from_all(row, best.value, own, drawn);
    }
    if (threadIdx.x == 0)
        chosen[place] = token;
}
