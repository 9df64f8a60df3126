// The choice of a token for every row: the best one, or one drawn after temperature, top-k and top-p.
//
// One CTA for a row, all of whose sums are added in a fixed order: a row depends on no other row. What Transformers' TemperatureLogitsWarper,
// TopKLogitsWarper and TopPLogitsWarper keep is kept here, but for a token at the very edge of top-p, as sums are rounded differently. Draws are those of
// `torch.multinomial`: the largest p / variate. Tokens are few after top-k, and mostly after top-p: these are listed in shared memory and compared with
// one another. Where they are not few, thresholds are found by bisection over all scores.
//   scores float32 [.][vocabulary]; variates float32 likewise, or null: those of `torch.Tensor.exponential_` for [1][vocabulary] and the row's generator,
//   by `spread` threads; chosen int64 [.]; tokens int64 [.][capacity] or null: what is chosen is put behind the tokens of rows with a slot
#include "token_rules.cuh"

constexpr int WARPS = 32;     // at most, of a CTA
constexpr int LISTED = 2048;  // entries at most
constexpr int FEW = 512, SOME = 256;  // the largest top-k for a list, and how many of the best threads' tokens it has without top-k
constexpr int KEY_BITS = 32, LOWER_BITS = 15, TOKEN_BITS = 20;  // of a score's key, those that a list of the best leaves out, and of a token

struct Best { float value; int token; };
__device__ inline Best better(const Best& a, const Best& b)
{
    return b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a;
}

// What all threads of a CTA have: sums in a fixed order, and the best. `room` has a place for each warp; a barrier must lie between two uses of it.
__device__ inline float sum_of_block(float own, float* room)
{
    const int lane = threadIdx.x % LANES;
    for (int step = 1; step < LANES; step <<= 1)
        own += __shfl_xor_sync(0xffffffffu, own, step);
    if (lane == 0)
        room[threadIdx.x / LANES] = own;
    __syncthreads();
    own = lane < blockDim.x / LANES ? room[lane] : 0.f;
    for (int step = 1; step < LANES; step <<= 1)
        own += __shfl_xor_sync(0xffffffffu, own, step);
    return own;
}
__device__ inline float sum_of_block(float own)
{
    __shared__ float room[WARPS];
    __syncthreads();  // the sum before has been read
    return sum_of_block(own, room);
}

__device__ inline Best best_of_warp(Best own)
{
    for (int step = 1; step < LANES; step <<= 1)
        own = better(own, {__shfl_xor_sync(0xffffffffu, own.value, step), __shfl_xor_sync(0xffffffffu, own.token, step)});
    return own;
}
__device__ inline Best best_of_block(Best own)
{
    __shared__ Best room[WARPS];
    const int lane = threadIdx.x % LANES;
    own = best_of_warp(own);
    __syncthreads();
    if (lane == 0)
        room[threadIdx.x / LANES] = own;
    __syncthreads();
    return best_of_warp(room[lane < blockDim.x / LANES ? lane : 0]);
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

// Some tokens of a row, in any order. A weight is exp(score - the largest one) in units of 2^-40, so that sums do not depend on their order.
struct Entry { float score; int token; unsigned long long weight; };
constexpr float ONE = 0x1p40f;

// A key that at least `wanted` threads reach, to its upper bits.
__device__ inline unsigned reached_by(unsigned own, int wanted)
{
    unsigned least = 0;
    for (int bit = KEY_BITS - 1; bit >= LOWER_BITS; --bit)
        if (__syncthreads_count(own >= (least | 1u << bit)) >= wanted)
            least |= 1u << bit;
    return least;
}

// Draw from the best tokens of a row: `outside` is the weight of all others. -1 if top-p may go beyond them. Of equal scores top-p removes those of lower
// tokens first, as a stable sort has it.
__device__ inline int draw_from(Entry* entries, int count, float largest, float outside, const Rules& rules, const Variates& variates)
{
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const float score = entries[i].score;
        int higher = 0;
        if (rules.top_k > 0)
            for (int j = 0; j < count; ++j)
                higher += entries[j].score > score;
        entries[i].weight = rules.top_k > 0 && higher >= rules.top_k ? 0 : (unsigned long long)(expf(score - largest) * ONE);
    }
    __syncthreads();
    const float edge = (float)(1. - rules.top_p);
    bool beyond = false;
    Best own = {-1.f, 0};
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const Entry entry = entries[i];
        bool kept = entry.weight > 0;
        if (rules.top_p < 1.) {
            const unsigned long long rest = (unsigned long long)(outside * ONE);
            unsigned long long total = rest, sum = rest;
            bool best = true, last = true;
            for (int j = 0; j < count; ++j) {
                const Entry other = entries[j];
                const bool below = other.score < entry.score || (other.score == entry.score && other.token <= entry.token);
                total += other.weight, sum += below ? other.weight : 0;
                best &= below, last &= !below || j == i;
            }
            kept &= best || (float)sum / (float)total > edge;
            beyond |= kept && last && !best && outside > 0.f;
        }
        if (kept)
            own = better(own, {expf(entry.score - largest) / variates.of(entry.token), entry.token});
    }
    if (__syncthreads_or(beyond))
        return -1;
    return best_of_block(own).token;
}

// Searches by bisection go three bits at a time: what `weight` gives a score counts at the limits above its `key`.
constexpr int BITS = 3, LIMITS = (1 << BITS) - 1;
struct Limits { float below[LIMITS + 1]; };  // below[c]: of keys from `from` to `from` + c * step - 1; of a block
template <class Key, class Weight>
__device__ inline Limits sums_below(const Scores& scores, unsigned from, unsigned step, Key key, Weight weight)
{
    __shared__ float room[LIMITS][WARPS];
    float sums[LIMITS] = {};
    scores.each([&](float score, int token) {
        const unsigned above = key(score, token) - from;
        const float own = weight(score, token);
#pragma unroll
        for (int c = 0; c < LIMITS; ++c)
            sums[c] += above < (c + 1) * step ? own : 0.f;
    });
    Limits made;
    made.below[0] = 0.f;
    __syncthreads();
#pragma unroll
    for (int c = 0; c < LIMITS; ++c)
        made.below[c + 1] = sum_of_block(sums[c], room[c]);
    return made;
}

// The largest key of so many bits below which there is not more than `most`; `before` becomes the sum below it.
template <class Key, class Weight>
__device__ inline unsigned search(const Scores& scores, int bits, float most, float& before, Key key, Weight weight)
{
    unsigned from = 0;
    for (int left = bits, own; left > 0; left -= own) {
        own = left < BITS ? left : BITS;
        const Limits sums = sums_below(scores, from, 1u << (left - own), key, weight);
        const int most_steps = (1 << own) - 1;
        int steps = 0;
        for (int more = 1; more <= most_steps; ++more)
            steps += steps == more - 1 && before + sums.below[more] <= most;
        from += (unsigned)steps << (left - own), before += sums.below[steps];
    }
    return from;
}

// Draw from all scores.
__device__ inline int draw_from_all(const Scores& scores, float largest, const Rules& rules, const Variates& variates)
{
    const auto key = [](float score, int) { return sortable(score); };
    const auto weight = [&](float score, int) { return expf(score - largest); };
    unsigned from = sortable(-INFINITY) + 1;
    if (rules.top_k > 0 && rules.top_k < scores.count) {  // not more than so many may be below the least one
        float before = 0.f;
        const float most = (float)(scores.count - rules.top_k);
        const unsigned least = search(scores, KEY_BITS, most, before, key, [](float, int) { return 1.f; });
        from = least > from ? least : from;
    }
    // the lowest key and, of equal scores, the lowest token that top-p keeps
    unsigned kept = from;
    int kept_token = 0;
    if (rules.top_p < 1.) {
        const auto counts = [&](float score, int) { return sortable(score) >= from ? expf(score - largest) : 0.f; };
        float total = 0.f, before = 0.f;
        scores.each([&](float score, int token) { total += counts(score, token); });
        total = sum_of_block(total);
        const float most = (float)(1. - rules.top_p) * total;
        kept = search(scores, KEY_BITS, most, before, key, counts);
        kept = kept > from ? kept : from;
        const unsigned top = sortable(largest), edge = kept < top ? kept : top;
        int equal = 0, last = 0;
        scores.each([&](float score, int token) { if (sortable(score) == edge) ++equal, last = token; });
        if (sum_of_block((float)equal) > 1.f) {
            last = (int)best_of_block({(float)last, 0}).value;
            const auto token_at_edge = [&](float score, int token) { return sortable(score) == edge ? (unsigned)token : 0xffffffffu; };
            kept_token = kept > top ? last : (int)search(scores, TOKEN_BITS, most, before, token_at_edge, weight);
            kept_token = kept_token < last ? kept_token : last;  // the last of the best ones stays
        }
        kept = edge;
    }
    Best own = {-1.f, scores.count};
    scores.each([&](float score, int token) {
        const unsigned its = sortable(score);
        if (its > kept || (its == kept && token >= kept_token))
            own = better(own, {expf(score - largest) / variates.of(token), token});
    });
    return best_of_block(own).token;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) choose_tokens(
    const float* scores, const Rules* rules, const float* variates, long long* chosen, long long* tokens, int by_row, int vocabulary, int spread,
    int capacity)
{
    __shared__ Entry entries[LISTED];
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
                        entries[at].score = score, entries[at].token = id;
                } else if (own.top_k <= 0)
                    outside += expf(score - best.value);
            });
            outside = sum_of_block(outside);  // and the entries are there
            if (listed <= LISTED)
                token = draw_from(entries, listed, best.value, outside, own, drawn);
        }
        if (token < 0)
            token = draw_from_all(row, best.value, own, drawn);
    }
    if (threadIdx.x == 0) {
        chosen[place] = token;
        if (tokens && own.slot >= 0)
            tokens[own.slot * capacity + own.length] = token;
    }
}
