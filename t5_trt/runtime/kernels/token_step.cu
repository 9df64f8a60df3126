// What follows the choice of a token: padding behind the end of a row, the row's buffer, who has ended, the report.
//
// One block for all rows. See t5_trt/generation/sampling.py, TokenChoice, for what the buffers hold.
extern "C" __global__ void token_step(
    long long* chosen, long long* tokens, bool* finished, long long* report, const bool* expired, const long long* eos,
    const long long* position, int rows, int capacity, int ends, int has_pad, int pad)
{
    const long long place = position[0] + 1;
    bool all = true;
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
        bool over = finished[row];
        long long token = chosen[row];
        if (over && has_pad)
            token = pad;
        for (int end = 0; end < ends; ++end)
            over |= token == eos[end];
        chosen[row] = token;
        tokens[(long long)row * capacity + place] = token;
        finished[row] = over;
        report[1 + row] = over;
        report[1 + rows + row] = token;
        all &= over;
    }
    all = __syncthreads_and(all);
    if (threadIdx.x == 0)
        report[0] = all || expired[0];
}
