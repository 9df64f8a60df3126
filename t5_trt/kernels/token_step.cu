// What follows the choice of a token: padding behind the end of a row, the row's buffer, who has ended, the report, the next input.
//
// One block for all rows. See t5_trt/generation/sampling.py, TokenChoice, for what the buffers hold. The tokens are those of `best`
// [rows] (the output matrix's kernel left the order of the largest logit and ~token), which is zero afterwards, or if it is null those
// of `chosen`. The report goes into `mailbox`, too. `next` [rows] and `positions` [count] are what the next step reads, or null; `position` moves on with them.
#include "launch.cuh"

extern "C" __global__ void token_step(
    long long* chosen, unsigned long long* best, long long* tokens, bool* finished, long long* report, const bool* expired,
    const long long* eos, long long* position, int* next, int* positions, long long* mailbox, const long long* epoch, int rows, int capacity,
    int ends, int has_pad, int pad, int count, int mails)
{
    wait_for_inputs();
    const long long place = position[0] + 1;
    bool all = true;
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
        bool over = finished[row];
        long long token;
        if (best) {
            token = (unsigned)~best[row];
            best[row] = 0;
        } else
            token = chosen[row];
        if (over && has_pad)
            token = pad;
        for (int end = 0; end < ends; ++end)
            over |= token == eos[end];
        chosen[row] = token;
        tokens[(long long)row * capacity + place] = token;
        finished[row] = over;
        report[1 + row] = over;
        report[1 + rows + row] = token;
        if (next)
            next[row] = token;
        all &= over;
    }
    all = __syncthreads_and(all);
    if (threadIdx.x == 0) {
        report[0] = all || expired[0];
        if (next)
            position[0] = place;
    }
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        positions[i] = place;
    __syncthreads();
    send_report(mailbox, epoch, report, 1 + 2 * rows, mails, place);
}
