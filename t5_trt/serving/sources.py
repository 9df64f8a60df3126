"""Sources of requests that are about to get rows: encoded in batches, on a GPU some of them before there are rows for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from t5_trt.engine.profiles import power_of_two
from t5_trt.runtime.captured_encoder import CAPTURED_TOKENS
from t5_trt.runtime.kv_buffers import bucket_length
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
            rows, tokens = _common_size(rows, tokens)
        ids_and_mask = torch.zeros((2, rows, tokens), dtype=torch.int64)
        ids, mask = ids_and_mask.numpy()
        for place, (job, length) in enumerate(zip(self.jobs, lengths, strict=True)):
            ids[place, :length], mask[place, :length] = job.input_ids[0].numpy(), job.attention_mask[0].numpy()
        return EncodingBatch(self.jobs, session.encode_rows(ids_and_mask))

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


def by_length(jobs: Sequence[Job], least_tokens: int = 0, most_tokens: int | None = None) -> list[list[Job]]:
    """Requests in batches whose sources differ in length by less than a factor of two, short ones first.

    Args:
        jobs: requests.
        least_tokens: as many, padding counted, take no longer than fewer do: short sources that come to less beside the next longer ones
            are put to those.
        most_tokens: of a batch of several requests, padding counted.
    """
    buckets: dict[int, list[Job]] = {}
    for job in jobs:
        buckets.setdefault(bucket_length(job.input_ids.shape[1], SMALLEST_SOURCE), []).append(job)
    batches: list[list[Job]] = []
    carried: list[Job] = []
    lengths = sorted(buckets)
    for number, length in enumerate(lengths, 1):
        carried = carried + buckets[length]
        if number == len(lengths) or len(carried) * lengths[number] > least_tokens:
            batches.append(carried)
            carried = []
    if most_tokens is None:
        return batches
    return [part for batch in batches for part in _parts(batch, most_tokens)]


def _parts(batch: list[Job], most_tokens: int) -> list[list[Job]]:
    """A batch in parts of at most so many tokens, padding counted."""
    longest = max(job.input_ids.shape[1] for job in batch)
    rows = max(1, most_tokens // bucket_length(longest, SMALLEST_SOURCE))
    return [batch[start : start + rows] for start in range(0, len(batch), rows)]


def _common_size(rows: int, tokens: int) -> tuple[int, int]:
    """The next size in powers of two, unless a batch is too large to be captured."""
    common = power_of_two(rows, 1), bucket_length(tokens, SMALLEST_SOURCE)
    return common if common[0] * common[1] <= CAPTURED_TOKENS else (rows, tokens)
