// What follows the choice of candidates in a step of beam search; t5_trt/generation/beam.py has the rules and the names.
//
// BEAMS and CANDIDATES are defined when this is compiled. A block for each batch entry: one thread decides, all of them move
// the rows, a column each, in registers. The last block to finish tells whether the search is over.
#define NEVER (-1.0e9f)

// The best `count` of `length` values, the first of equal ones first.
__device__ void top(const float* values, int length, int count, int* best)
{
    for (int rank = 0; rank < count; ++rank) {
        int found = -1;
        for (int index = 0; index < length; ++index) {
            bool taken = false;
            for (int earlier = 0; earlier < rank; ++earlier)
                taken |= best[earlier] == index;
            if (!taken && (found < 0 || values[index] > values[found]))
                found = index;
        }
        best[rank] = found;
    }
}

// new rows out of old ones: `source` counts the BEAMS finished rows first, then candidates, which continue a running row
template <typename T>
__device__ T pick(const T (&finished)[BEAMS], const T (&running)[BEAMS], int source, const int* beam_of, bool here, T added)
{
    if (source >= BEAMS && here)
        return added;
    const int row = source >= BEAMS ? beam_of[source - BEAMS] : source;
    T value = source >= BEAMS ? running[0] : finished[0];
#pragma unroll
    for (int other = 1; other < BEAMS; ++other)
        if (row == other)
            value = source >= BEAMS ? running[other] : finished[other];
    return value;
}

extern "C" __global__ void beam_step(
    const float* scores, const long long* places, long long* tokens, int* running_indices, float* running_scores,
    long long* sequences, int* beam_indices, float* beam_scores, bool* full, bool* improvable, long long* report,
    const bool* expired, const long long* limits, const float* penalties, const long long* eos, const long long* position,
    long long* chosen, long long* parents, int* counters, int vocabulary, int capacity, int ends, int stops_early, int hopeful)
{
    __shared__ int beam_of[CANDIDATES], going[BEAMS], best[BEAMS];
    __shared__ long long id_of[CANDIDATES];
    const int entry = blockIdx.x, first = entry * BEAMS;
    const bool ended = report[0] != 0;
    const long long place = position[0] + 1, made = place + 1 - limits[0];
    if (threadIdx.x == 0) {
        float running[CANDIDATES], merged[BEAMS + CANDIDATES];
        bool hit[CANDIDATES], every_hit = true, every_full = true;
        for (int beam = 0; beam < BEAMS; ++beam) {
            every_full &= full[first + beam];
            merged[beam] = beam_scores[first + beam];
        }
        for (int index = 0; index < CANDIDATES; ++index) {
            const float score = scores[entry * CANDIDATES + index];
            const long long chosen_place = places[entry * CANDIDATES + index];
            beam_of[index] = chosen_place / vocabulary;
            id_of[index] = chosen_place % vocabulary;
            hit[index] = place + 1 >= limits[1] || expired[0];
            for (int end = 0; end < ends; ++end)
                hit[index] |= id_of[index] == eos[end];
            every_hit &= hit[index];
            running[index] = hit[index] ? score + NEVER : score;
            float final_score = score / penalties[made];
            if (stops_early && every_full)
                final_score += NEVER;
            if (!improvable[entry])
                final_score += NEVER;
            if (!(hit[index] && index < BEAMS))
                final_score += NEVER;
            merged[BEAMS + index] = final_score;
        }
        top(running, CANDIDATES, BEAMS, going);
        top(merged, BEAMS + CANDIDATES, BEAMS, best);
        if (!ended) {
            bool was_full[BEAMS];
            float worst = 0.0f;
            every_full = true;
            for (int beam = 0; beam < BEAMS; ++beam)
                was_full[beam] = full[first + beam];
            for (int beam = 0; beam < BEAMS; ++beam) {
                const int source = best[beam];
                const bool now = source < BEAMS ? was_full[source] : hit[source - BEAMS] && source - BEAMS < BEAMS;
                full[first + beam] = now;
                every_full &= now;
                beam_scores[first + beam] = merged[source];
                running_scores[first + beam] = running[going[beam]];
                worst = beam == 0 || merged[source] < worst ? merged[source] : worst;
            }
            const float hope = running[going[0]] / penalties[hopeful ? limits[2] - limits[0] : made];
            bool better = false;
            for (int beam = 0; beam < BEAMS; ++beam)
                better |= hope > (full[first + beam] ? worst : NEVER);
            improvable[entry] = improvable[entry] && better;
        }
        report[1 + entry] = !improvable[entry] || (stops_early && every_full);
        // bits that all entries add up to: can improve, has a row that goes on, is not full
        if (improvable[entry])
            atomicAdd(counters + 1, 1);
        if (!every_hit)
            atomicAdd(counters + 2, 1);
        if (!every_full)
            atomicAdd(counters + 3, 1);
    }
    __syncthreads();
    if (!ended) {
        const long long corner = (long long)first * capacity;
        for (long long column = threadIdx.x; column <= place; column += blockDim.x) {
            long long old_tokens[BEAMS], old_sequences[BEAMS];
            int old_running[BEAMS], old_indices[BEAMS];
#pragma unroll
            for (int beam = 0; beam < BEAMS; ++beam) {
                const long long at = corner + (long long)beam * capacity + column;
                old_tokens[beam] = tokens[at], old_sequences[beam] = sequences[at];
                old_running[beam] = running_indices[at], old_indices[beam] = beam_indices[at];
            }
            const bool here = column == place;
#pragma unroll
            for (int beam = 0; beam < BEAMS; ++beam) {
                const long long at = corner + (long long)beam * capacity + column;
                const int from = going[beam], kept = best[beam], ended_as = kept < BEAMS ? 0 : kept - BEAMS;
                tokens[at] = pick(old_sequences, old_tokens, BEAMS + from, beam_of, here, id_of[from]);
                running_indices[at] = pick(old_indices, old_running, BEAMS + from, beam_of, here, first + beam_of[from]);
                sequences[at] = pick(old_sequences, old_tokens, kept, beam_of, here, id_of[ended_as]);
                beam_indices[at] = pick(old_indices, old_running, kept, beam_of, here, first + beam_of[ended_as]);
            }
        }
    }
    for (int beam = threadIdx.x; beam < BEAMS; beam += blockDim.x) {
        const long long last = tokens[(long long)(first + beam) * capacity + place];
        chosen[first + beam] = ended ? (last < 0 ? 0 : last) : id_of[going[beam]];  // behind the end stands the fill, maybe -1
        parents[first + beam] = ended ? first + beam : first + beam_of[going[beam]];
    }
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(counters, 1) == gridDim.x - 1) {
            __threadfence();
            const bool goes_on = atomicAdd(counters + 1, 0) && atomicAdd(counters + 2, 0);
            if (!goes_on || (stops_early && !atomicAdd(counters + 3, 0)))
                report[0] = 1;
            for (int counter = 0; counter < 4; ++counter)
                counters[counter] = 0;
        }
    }
}
