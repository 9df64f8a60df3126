"""Whether a result that differs from the Hugging Face class's is a tie: the Hugging Face class answers so too when its scores are rounded
differently.

Two tokens, beams or ends of a draw's intervals may be closer to each other than two correct programs' results are. Such a
result says nothing about either program; any other difference is an error.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from transformers import LogitsProcessorList

from benchmarks.soak_requests import Request, answer

#: how often the Hugging Face class is asked again, each time with other disturbances of its scores
ATTEMPTS = 12


def rounding(ours: Any, hugging_face: Any, request: Request) -> float:
    """Largest absolute difference between the logits of two models on a greedy request, as long as their tokens agree."""
    made = [
        model.generate(**request.arguments, output_logits=True, return_dict_in_generate=True)
        for model in (ours, hugging_face)
    ]
    largest = 0.0
    for place, (left, right) in enumerate(zip(made[0].logits, made[1].logits, strict=False)):
        same = (made[0].sequences[:, : place + 1] == made[1].sequences[:, : place + 1]).all(1)
        if not same.any():
            break
        largest = max(largest, float((left - right)[same].abs().max()))
    return largest


def is_tie(hugging_face: Any, request: Request, rows: list[list[int]], size: float, end: float) -> bool:
    """Whether the Hugging Face class gives these rows when uniform noise of that size is added to its scores.

    Args:
        hugging_face: the Hugging Face model.
        request: what was asked.
        rows: of tokens that it has not given without noise.
        size: largest absolute value of the noise.
        end: value of ``time.monotonic()`` after which no further attempt is made.
    """
    for attempt in range(ATTEMPTS):
        if time.monotonic() > end:
            return False
        processors = LogitsProcessorList([_Noise(size, attempt, hugging_face.device)])
        arguments = {**request.arguments, "logits_processor": processors}
        if answer(hugging_face, dataclasses.replace(request, arguments=arguments)) == rows:
            return True
    return False


class _Noise:
    """A processor that adds uniform noise from a generator of its own, so that draws of tokens stay as they were."""

    def __init__(self, size: float, seed: int, device: Any) -> None:
        self.size = size
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Add it."""
        noise = torch.rand(scores.shape, generator=self._generator, device=scores.device)
        return scores + self.size * (2 * noise - 1)
