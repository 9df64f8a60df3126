"""Sources of requests that are about to get rows: encoded together, on a GPU some of them before there are rows for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from t5_trt.runtime.row_buffers import RowSession
from t5_trt.runtime.row_sources import BatchSize, RowSources
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

    def begun(self, session: RowSession) -> EncodingBatch:
        """Have a session encode them."""
        sources = [(job.input_ids[0].numpy(), job.attention_mask[0].numpy()) for job in self.jobs]
        return EncodingBatch(self.jobs, session.encode_rows(sources))

    @property
    def done(self) -> bool:
        """Whether the sources are encoded; this does not wait."""
        return self.sources is not None and self.sources.done

    def split(self) -> list[EncodedSource]:
        """What each row will read. On a GPU the current stream waits for it, the host does not."""
        assert self.sources is not None
        self.sources.follow()
        return [EncodedSource(job, *own) for job, own in zip(self.jobs, self.sources.split(), strict=True)]


def by_length(
    jobs: Sequence[Job],
    size: BatchSize,
    begin_tokens: int,
    most_tokens: int | None = None,
) -> list[list[Job]]:
    """Requests in batches of similar lengths, short ones first: those that are encoded soonest, where all tokens of a batch take as long.

    Args:
        jobs: requests.
        size: of a batch, padding counted.
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
