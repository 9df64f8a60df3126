"""Sources of unlike lengths as one row of tokens, one behind another, for the encoder that takes them so.

How data flows, all of it in the encoder's stream (see `t5_trt.runtime.row_sources`):

    host     ids [T], mask [T], starts [R + 1] and cross bias [T] of up to R sources -> page-locked memory -> one copy to the GPU
    encoder  hidden states [T, E]: a CUDA graph of the size (T, R), of which there are few; what is behind the last source is nobody's
    rows     cross-attention's product -> K/V [L, 2, H, T, D] in memory of their own, of which each source has a slice; such memory has few
             sizes, so that what a batch frees does for a later one
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from t5_trt.engine.profiles import power_of_two
from t5_trt.runtime.captured_encoder import CAPTURED_TOKENS, LENGTH_STEP, CapturedSizes, Tensors
from t5_trt.runtime.row_sources import EncoderStream, RowSources, Source
from t5_trt.runtime.torch_layers import TorchEncoder

#: sources that are packed together: each may cost a CTA of attention with fewer queries than it could have
MOST_SOURCES = 32


class PackedEncoder:
    """Encodes packed sources for rows.

    Args:
        form: computes; it takes packed sources.
        sizes: hold the graphs.
        beside: the stream, which is the current one.
    """

    def __init__(self, form: TorchEncoder, sizes: CapturedSizes, beside: EncoderStream) -> None:
        self._form, self._sizes, self._beside = form, sizes, beside

    def run(self, sources: Sequence[Source], hidden_bias: float) -> RowSources:
        """What rows read of sources; `hidden_bias` is the value of the cross bias that hides a token."""
        lengths = [len(ids) for ids, _ in sources]
        size = packed_size(lengths)
        numbers = self._beside.host_memory(_count(*size) + size[0] // 2)
        starts = _write(numbers.numpy(), sources, size, hidden_bias)
        uploaded = self._beside.upload(numbers)
        inputs, bias = uploaded[: _count(*size)], uploaded[_count(*size) :].view(torch.float32)

        def load(buffers: Tensors) -> None:
            buffers[0].copy_(inputs)

        work = partial(self._encoded, size)
        if size[0] > CAPTURED_TOKENS:
            (hidden,) = work((inputs,))
        else:
            (hidden,), _ = self._sizes.run(("packed", *size), lambda: (torch.zeros_like(inputs),), load, work)
        places = [(0, begin, length) for begin, length in zip(starts, lengths, strict=True)]
        return self._beside.sources(self._form.cross(hidden[None]), bias[None], places)

    def _encoded(self, size: tuple[int, int], inputs: Tensors) -> Tensors:
        """Hidden states [T, E] of what `_write` has written."""
        numbers, tokens = inputs[0], size[0]
        return (self._form.run_packed(numbers[:tokens], numbers[tokens : 2 * tokens], numbers[2 * tokens :]),)


def packed_size(lengths: Sequence[int]) -> tuple[int, int]:
    """Tokens and sources that a batch of some lengths has room for: the next of about four sizes from one power of two to the next.

    Sources take `LENGTH_STEP` tokens at least, so that small batches have room for few.
    """
    needed = max(sum(lengths), LENGTH_STEP * len(lengths))
    step = max(power_of_two(needed, 1) // 8, LENGTH_STEP)
    tokens = -(-needed // step) * step
    return tokens, max(min(tokens // LENGTH_STEP, MOST_SOURCES), len(lengths))


def _count(tokens: int, sources: int) -> int:
    """Numbers that the encoder reads: ids, mask and starts."""
    return 2 * tokens + sources + 1


def _write(numbers: np.ndarray, sources: Sequence[Source], size: tuple[int, int], hidden_bias: float) -> list[int]:
    """Write ids, mask, starts and, in float32, the cross bias into zeros, int64 [..]; return the first token of each source."""
    ids, mask, starts, bias = np.split(numbers, (size[0], 2 * size[0], _count(*size)))
    np.cumsum([len(own) for own, _ in sources], out=starts[1 : len(sources) + 1])
    used = int(starts[len(sources)])
    starts[len(sources) + 1 :] = used
    for target, given in zip((ids, mask), zip(*sources, strict=True), strict=True):
        np.concatenate(given, out=target[:used])
    bias.view(np.float32)[:used][mask[:used] == 0] = hidden_bias
    return [int(start) for start in starts[: len(sources)]]
