// Rows of a K/V cache change places, in place: beam n of a batch entry goes on with what beam parents[n] held.
//
// BEAMS is defined when this is compiled. A thread holds the same 16 bytes of all beams of an entry in registers and writes
// those back that differ, so that nothing is read twice and no second cache is needed; tokens that are not there yet are
// left alone. kv is [layers and K/V, entries, BEAMS, heads, capacity, vectors]; parents are rows counted over all entries.
// The grid is (blocks over heads, capacity and vectors; entries; layers and K/V).
#include "launch.cuh"

extern "C" __global__ void reorder_rows(
    uint4* kv, const long long* parents, const long long* position, int entries, int heads, int capacity, int vectors)
{
    wait_for_inputs();
    const int entry = blockIdx.y;
    long long source[BEAMS];
    bool moves = false;
#pragma unroll
    for (int beam = 0; beam < BEAMS; ++beam) {
        source[beam] = parents[entry * BEAMS + beam] - (long long)entry * BEAMS;
        moves |= source[beam] != beam;
    }
    if (!moves)
        return;
    const long long row = (long long)heads * capacity * vectors;
    const long long place = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= row || place / vectors % capacity > position[0])
        return;
    uint4* here = kv + ((long long)blockIdx.z * entries + entry) * BEAMS * row + place;
    uint4 old[BEAMS];
#pragma unroll
    for (int beam = 0; beam < BEAMS; ++beam)
        old[beam] = here[beam * row];
#pragma unroll
    for (int beam = 0; beam < BEAMS; ++beam) {
        uint4 value = old[0];
#pragma unroll
        for (int other = 1; other < BEAMS; ++other) // not old[source[beam]]: that would put the array into memory
            if (source[beam] == other)
                value = old[other];
        if (source[beam] != beam)
            here[beam * row] = value;
    }
}
