"""Sources of requests that are about to get rows: encoded in batches, on a GPU some of them before there are rows for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from t5_trt.engine.profiles import power_of_two
from t5_trt.runtime.captured_encoder import CAPTURED_TOKENS
from t5_trt.runtime.row_buffers import SMALLEST_SOURCE, RowSession
from t5_trt.runtime.row_sources import RowSources
from t5_trt.serving.handle import Job


@dataclass(frozen=True)
class EncodedSource:
    """A request and what its row will read.

    Attributes:
        job: the request.
        cross: [L, 2, H, s, D].
        bias: [s].
    """

    job: Job
    cross: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class EncodingBatch:
    """Requests whose sources are being encoded together.

    Attributes:
        jobs: the requests.
        sources: of them, in their order; None before the encoder has been given them.
    """

    jobs: Sequence[Job]
    sources: RowSources | None = None

    def begun(self, session: RowSession, *, in_common_sizes: bool) -> EncodingBatch:
        """Have a session encode them.

        Args:
            session: of the model.
            in_common_sizes: pad small batches to sizes that many have, as encoders on a GPU are captured by size.
        """
        lengths = self._lengths
        rows, tokens = len(lengths), max(lengths)
        if in_common_sizes:
            common = common_size(rows, tokens)
            rows, tokens = common if common[0] * common[1] <= CAPTURED_TOKENS else (rows, tokens)
        ids_and_mask = np.zeros((2, rows, tokens), np.int64)
        ids, mask = ids_and_mask
        for place, (job, length) in enumerate(zip(self.jobs, lengths, strict=True)):
            ids[place, :length], mask[place, :length] = job.input_ids[0].numpy(), job.attention_mask[0].numpy()
        return EncodingBatch(self.jobs, session.encode_rows(torch.from_numpy(ids_and_mask)))

    @property
    def done(self) -> bool:
        """Whether the sources are encoded; this does not wait."""
        return self.sources is not None and self.sources.done

    def split(self) -> list[EncodedSource]:
        """What each row will read. On a GPU the current stream waits for it, the host does not."""
        assert self.sources is not None
        self.sources.follow()
        cross, bias = self.sources.cross, self.sources.bias
        return [
            EncodedSource(job, cross[:, :, place, :, :length], bias[place, :length])
            for place, (job, length) in enumerate(zip(self.jobs, self._lengths, strict=True))
        ]

    @property
    def _lengths(self) -> list[int]:
        return [job.input_ids.shape[1] for job in self.jobs]


def by_length(
    jobs: Sequence[Job],
    size: Callable[[int, int], tuple[int, int]],
    begin_tokens: int,
    most_tokens: int | None = None,
) -> list[list[Job]]:
    """Requests in batches of similar lengths, short ones first: those that are encoded soonest, where all tokens of a batch take as long.

    Args:
        jobs: requests.
        size: (requests, tokens of the longest) -> rows and tokens that are encoded, padding counted.
        begin_tokens: as many take as long as to begin a batch.
        most_tokens: of a batch of several requests, padding counted.
    """
    ordered = sorted(jobs, key=lambda job: job.input_ids.shape[1])
    # of the first requests, by their number: what they cost, and where their last batch begins
    least, begins = [0], [0]
    for end, job in enumerate(ordered, 1):
        longest = job.input_ids.shape[1]
        costs: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):
            rows, tokens = size(end - begin, longest)
            if costs and most_tokens is not None and rows * tokens > most_tokens:
                break
            costs.append((least[begin] + begin_tokens + rows * tokens, begin))
        cost, begin = min(costs)
        least.append(cost)
        begins.append(begin)
    batches: list[list[Job]] = []
    end = len(ordered)
    while end:
        batches.insert(0, ordered[begins[end] : end])
        end = begins[end]
    return batches


def own_size(rows: int, tokens: int) -> tuple[int, int]:
    """The size of a batch without padding of its own."""
    return rows, tokens


def common_size(rows: int, tokens: int) -> tuple[int, int]:
    """The next size of those that many batches have: rows are powers of two, tokens are those and one and a half times those."""
    room = power_of_two(tokens, SMALLEST_SOURCE)
    if tokens <= room // 4 * 3 and room >= 4 * SMALLEST_SOURCE:  # smaller steps are none of a captured encoder's
        room = room // 4 * 3
    return power_of_two(rows, 1), room
