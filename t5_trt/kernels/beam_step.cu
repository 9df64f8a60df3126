// What follows the choice of candidates in a step of beam search; t5_trt/generation/beam_search.py has the rules and the names.
//
// BEAMS, CANDIDATES and SPANS are defined when this is compiled. A block for each batch entry: its first warp chooses and decides, all
// threads move the rows, a column each, in registers. The last block to finish tells whether the search is over.
// The candidates of an entry are given in `scores` and `places` [entries][CANDIDATES], or, if SPANS is not 0, chosen here from what
// `beam_candidates` left of its rows; they then go by log-softmax, unless `statistics` is null, plus the rows' scores so far.
// The report goes into `mailbox`, too. `next`, `positions` and `ancestors` are what the next step reads, or null: the tokens [rows], the positions [count], and for each
// token of a row the beam [rows][stride] in whose cache its key and value lie, which changes instead of the cache. `position` moves on with `next`.
#include "launch.cuh"
#define NEVER (-1.0e9f)

constexpr int LISTS = BEAMS * SPANS, LISTS_A_LANE = (LISTS + LANES - 1) / LANES, LISTED = LISTS * CANDIDATES;
constexpr int HELD = LISTED > 0 && LISTED <= 4096 ? LISTED : 1;  // that shared memory holds

__shared__ int beam_of[CANDIDATES], id_of[CANDIDATES], going[BEAMS], best[BEAMS];
__shared__ float score_of[CANDIDATES], running[CANDIDATES], merged[BEAMS + CANDIDATES];
__shared__ bool hit[CANDIDATES], was_full[BEAMS];
#if SPANS
__shared__ float held_score[HELD], most_of[BEAMS], log_of[BEAMS];
__shared__ int held_token[HELD];

// The best candidates of an entry, out of sorted lists: SPANS for every row. All threads must be here.
__device__ inline void merge_lists(const float* found, const int* tokens, const float* statistics, const float* so_far, int vocabulary)
{
    const int lane = threadIdx.x;
    if (LISTED == HELD)
        for (int i = threadIdx.x; i < LISTED; i += blockDim.x)
            held_score[i] = found[i], held_token[i] = tokens[i];
    for (int beam = threadIdx.x; beam < BEAMS; beam += blockDim.x) {
        float most = 0.f, sum = 1.f;
        if (statistics) {
            const float* own = statistics + beam * SPANS * 2;
            most = own[0], sum = 0.f;
            for (int span = 1; span < SPANS; ++span)
                most = own[span * 2] > most ? own[span * 2] : most;
            for (int span = 0; span < SPANS; ++span)
                sum += own[span * 2 + 1] * expf(own[span * 2] - most);
        }
        most_of[beam] = most, log_of[beam] = logf(sum);
    }
    __syncthreads();
    if (threadIdx.x >= LANES)
        return;
    int heads[LISTS_A_LANE] = {};
    unsigned keys[LISTS_A_LANE], flat[LISTS_A_LANE];
    const auto look = [&](int i) {
        const int list = i * LANES + lane;
        keys[i] = 0, flat[i] = 0xffffffffu;
        if (list >= LISTS || heads[i] >= CANDIDATES)
            return;
        const int at = list * CANDIDATES + heads[i], beam = list / SPANS;
        const int token = LISTED == HELD ? held_token[at] : tokens[at];
        const float score = LISTED == HELD ? held_score[at] : found[at];
        if (token >= 0)
            keys[i] = sortable(score - most_of[beam] - log_of[beam] + so_far[beam]), flat[i] = beam * vocabulary + token;
    };
#pragma unroll
    for (int i = 0; i < LISTS_A_LANE; ++i)
        look(i);
    for (int rank = 0; rank < CANDIDATES; ++rank) {
        unsigned own = 0, place = 0xffffffffu;
#pragma unroll
        for (int i = 0; i < LISTS_A_LANE; ++i)
            if (keys[i] > own || (keys[i] == own && flat[i] < place))
                own = keys[i], place = flat[i];
        const unsigned top = lanes_max(own), chosen = lowest_with(top, own, place);
        if (own == top && place == chosen) {
            score_of[rank] = top ? from_sortable(top) : -INFINITY;
            beam_of[rank] = top ? chosen / vocabulary : 0, id_of[rank] = top ? chosen % vocabulary : 0;
#pragma unroll
            for (int i = 0; i < LISTS_A_LANE; ++i)
                if (flat[i] == place && keys[i]) {
                    ++heads[i];
                    look(i);
                }
        }
    }
    __syncwarp();  // all lanes read what the winners wrote
}
#endif

// Where the best `count` of `length` values are, the first of equal ones first; by the first warp, for all of them to see.
__device__ inline void top(const float* values, int length, int count, int* best)
{
    for (int i = threadIdx.x; i < count; i += LANES)
        best[i] = i;  // what stays if a value is not a number
    __syncwarp();
    for (int i = threadIdx.x; i < length; i += LANES) {
        int rank = 0;
        for (int other = 0; other < length; ++other)
            rank += values[other] > values[i] || (values[other] == values[i] && other < i);
        if (rank < count)
            best[rank] = i;
    }
    __syncwarp();
}

// new rows out of old ones: `source` counts the BEAMS finished rows first, then candidates, which continue a running row
template <typename T>
__device__ T pick(const T (&finished)[BEAMS], const T (&going_on)[BEAMS], int source, bool here, T added)
{
    if (source >= BEAMS && here)
        return added;
    const int row = source >= BEAMS ? beam_of[source - BEAMS] : source;
    T value = source >= BEAMS ? going_on[0] : finished[0];
#pragma unroll
    for (int other = 1; other < BEAMS; ++other)
        if (row == other)
            value = source >= BEAMS ? going_on[other] : finished[other];
    return value;
}

// One column of the rows that go on and of the finished ones; `added(i)` is what candidate i has at its end.
template <typename T, class Added>
__device__ inline void move_column(T* running, T* finished, int capacity, bool here, Added added)
{
    T old_running[BEAMS], old_finished[BEAMS];
#pragma unroll
    for (int beam = 0; beam < BEAMS; ++beam)
        old_running[beam] = running[(long long)beam * capacity], old_finished[beam] = finished[(long long)beam * capacity];
#pragma unroll
    for (int beam = 0; beam < BEAMS; ++beam) {
        const int from = going[beam], kept = best[beam];
        running[(long long)beam * capacity] = pick(old_finished, old_running, BEAMS + from, here, (T)added(from));
        finished[(long long)beam * capacity] = pick(old_finished, old_running, kept, here, (T)added(kept < BEAMS ? 0 : kept - BEAMS));
    }
}

extern "C" __global__ void beam_step(
    const float* scores, const long long* places, const float* found, const int* found_tokens, const float* statistics,
    long long* tokens, int* running_indices, float* running_scores, long long* sequences, int* beam_indices, float* beam_scores,
    bool* full, bool* improvable, long long* report, const bool* expired, const long long* limits, const float* penalties,
    const long long* eos, long long* position, long long* chosen, long long* parents, int* counters, int* next, int* positions,
    unsigned char* ancestors, long long* mailbox, const long long* epoch, int vocabulary, int capacity, int ends, int stops_early, int hopeful,
    int count, int stride, int mails)
{
    const int entry = blockIdx.x, first = entry * BEAMS;
    // what the last step left is there before the kernel in front of this one ends
    const bool ended = report[0] != 0, can_improve = improvable[entry], is_expired = expired[0];
    const long long place = position[0] + 1, made = place + 1 - limits[0], last = limits[1];
    const float penalty = penalties[made];
    for (int beam = threadIdx.x; beam < BEAMS; beam += blockDim.x)
        merged[beam] = beam_scores[first + beam], was_full[beam] = full[first + beam];
    wait_for_inputs();
#if SPANS
    merge_lists(found + (long long)entry * LISTED, found_tokens + (long long)entry * LISTED,
                statistics ? statistics + entry * LISTS * 2 : statistics, running_scores + first, vocabulary);
#else
    for (int i = threadIdx.x; i < CANDIDATES; i += blockDim.x) {
        const long long at = places[entry * CANDIDATES + i];
        score_of[i] = scores[entry * CANDIDATES + i], beam_of[i] = at / vocabulary, id_of[i] = at % vocabulary;
    }
    __syncthreads();
#endif
    if (threadIdx.x < LANES) {
        bool every_hit = true, every_full = true;
        for (int beam = 0; beam < BEAMS; ++beam)
            every_full &= was_full[beam];
        for (int i = threadIdx.x; i < CANDIDATES; i += LANES) {
            bool over = place + 1 >= last || is_expired;
            for (int end = 0; end < ends; ++end)
                over |= id_of[i] == eos[end];
            hit[i] = over;
            every_hit &= over;
            running[i] = over ? score_of[i] + NEVER : score_of[i];
            float final_score = score_of[i] / penalty;
            if (stops_early && every_full)
                final_score += NEVER;
            if (!can_improve)
                final_score += NEVER;
            if (!(over && i < BEAMS))
                final_score += NEVER;
            merged[BEAMS + i] = final_score;
        }
        every_hit = __all_sync(0xffffffffu, every_hit);
        __syncwarp();
        top(running, CANDIDATES, BEAMS, going);
        top(merged, BEAMS + CANDIDATES, BEAMS, best);
        if (threadIdx.x == 0) {
            bool improves = can_improve;
            if (!ended) {
                float worst = 0.0f;
                every_full = true;
                for (int beam = 0; beam < BEAMS; ++beam) {
                    const int source = best[beam];
                    const bool now = source < BEAMS ? was_full[source] : hit[source - BEAMS] && source - BEAMS < BEAMS;
                    full[first + beam] = now;
                    every_full &= now;
                    beam_scores[first + beam] = merged[source];
                    running_scores[first + beam] = running[going[beam]];
                    worst = beam == 0 || merged[source] < worst ? merged[source] : worst;
                }
                const float hope = running[going[0]] / (hopeful ? penalties[limits[2] - limits[0]] : penalty);
                bool better = false;
                for (int beam = 0; beam < BEAMS; ++beam) {
                    const int source = best[beam];
                    const bool now = source < BEAMS ? was_full[source] : hit[source - BEAMS] && source - BEAMS < BEAMS;
                    better |= hope > (now ? worst : NEVER);
                }
                improves = can_improve && better;
                improvable[entry] = improves;
            }
            report[1 + entry] = !improves || (stops_early && every_full);
            // bits that all entries add up to: can improve, has a row that goes on, is not full
            if (improves)
                atomicAdd(counters + 1, 1);
            if (!every_hit)
                atomicAdd(counters + 2, 1);
            if (!every_full)
                atomicAdd(counters + 3, 1);
        }
    }
    __syncthreads();
    if (!ended) {
        const long long corner = (long long)first * capacity;
        for (long long column = threadIdx.x; column <= place; column += blockDim.x) {
            const bool here = column == place;
            move_column(tokens + corner + column, sequences + corner + column, capacity, here, [](int i) { return (long long)id_of[i]; });
            move_column(running_indices + corner + column, beam_indices + corner + column, capacity, here, [=](int i) { return first + beam_of[i]; });
        }
    }
    if (ancestors)
        for (long long column = threadIdx.x; column <= place; column += blockDim.x) {
            unsigned char old[BEAMS];
#pragma unroll
            for (int beam = 0; beam < BEAMS; ++beam)
                old[beam] = ancestors[(long long)(first + beam) * stride + column];
#pragma unroll
            for (int beam = 0; beam < BEAMS; ++beam) {
                const unsigned char from = ended ? old[beam] : pick(old, old, BEAMS + going[beam], false, old[0]);
                ancestors[(long long)(first + beam) * stride + column] = column == place ? beam : from;
            }
        }
    for (int beam = threadIdx.x; beam < BEAMS; beam += blockDim.x) {
        long long token = id_of[going[beam]];
        if (ended) {  // behind the end stands the fill, maybe -1
            const long long last = tokens[(long long)(first + beam) * capacity + place];
            token = last < 0 ? 0 : last;
        }
        chosen[first + beam] = token;
        parents[first + beam] = ended ? first + beam : first + beam_of[going[beam]];
        if (next)
            next[first + beam] = token;
    }
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(counters, 1) == gridDim.x - 1;
        if (is_last) {
            __threadfence();
            const bool goes_on = atomicAdd(counters + 1, 0) && atomicAdd(counters + 2, 0);
            if (!goes_on || (stops_early && !atomicAdd(counters + 3, 0)))
                report[0] = 1;
            for (int counter = 0; counter < 4; ++counter)
                counters[counter] = 0;
            if (next)
                position[0] = place;
        }
    }
    __syncthreads();
    if (!is_last)
        return;
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        positions[i] = place;
    send_report(mailbox, epoch, report, 1 + gridDim.x, mails, place);
}
