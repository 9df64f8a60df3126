"""Several query positions of every sequence by the kernels of the one-token step: each of them is a row of its own.

    tokens [R, P] -> R * P rows; row r * P + p stands at position length + p of sequence r
    project_qkv   writes a row's key and value into the cache of its sequence, at its position
    attend_self   reads that cache up to the row's position, so that no mask is needed
    attend_cross  reads a source, which N * P rows share

As a row's results do not depend on how many rows there are, logits are those of single steps, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from t5_trt.kernels.decode_step import DecodeKernels, DecodeStep
from t5_trt.kernels.step_memory import StepBuffers

#: positions of a sequence, and rows, that a step takes; longer prompts are decoded piece by piece
MOST_POSITIONS, MOST_ROWS = 64, 512
#: number of sizes that a slot keeps programs for, least recently used first out
PROGRAMS_KEPT = 16


def positions_at_once(sequences: int, heads: int, capacity: int) -> int:
    """Positions of each sequence that a step takes, at least 1.

    Args:
        sequences: R. With more than one position there are at most 256, whose numbers are uint8.
        heads: of the model.
        capacity: of the cache, in tokens.
    """
    rows = min(MOST_ROWS, (1 << 31) // (heads * capacity))  # places are int32
    return max(1, min(MOST_POSITIONS, rows // sequences))


@dataclass
class PositionsStep:
    """A step of P positions of each sequence, over the cache of another step.

    Attributes:
        step: of R * P rows.
        offsets: int32 [2, R * P], what is added to the cache's length: for `numbers`.
        numbers: int32 [2, R * P], positions and places of the rows.
        graph: the layers as a CUDA graph, captured when this is used again; None before.
        used: whether it was used.
    """

    step: DecodeStep
    offsets: torch.Tensor
    numbers: torch.Tensor
    graph: Any = None
    used: bool = False

    @classmethod
    def over(cls, single: DecodeStep, count: int, kernels: DecodeKernels, buffers: StepBuffers) -> PositionsStep:
        """P positions.

        Args:
            single: the step of one position of R sequences, whose caches and sources are used.
            count: P.
            kernels: for R * P rows.
            buffers: for at least so many rows, and as many chunks as those of `single`.
        """
        given = single.inputs
        heads, capacity = given.kv.shape[3:5]
        rows = torch.arange(len(given.tokens) * count, dtype=torch.int32, device=given.kv.device)
        sequence, position = rows // count, rows % count
        offsets = torch.stack((position, position + (sequence - rows) * (heads * capacity)))
        numbers = torch.empty_like(offsets)
        inputs = replace(
            given,
            tokens=torch.empty_like(rows),
            position=numbers[0],
            places=numbers[1],
            ancestors=sequence.to(torch.uint8)[:, None].repeat(1, capacity + 1),
            neighbours=len(rows),
            beams=given.beams * count,
        )
        return cls(replace(single, kernels=kernels, buffers=buffers, inputs=inputs), offsets, numbers)

    def feed(self, tokens: torch.Tensor, length: int) -> None:
        """Set the tokens [R, P] to decode, and how many there are before them."""
        given = self.step.inputs.tokens
        given.view(tokens.shape).copy_(tokens)
        torch.add(self.offsets, length, out=self.numbers)
