"""Where rows of tokens differ, and how close the two best logits were there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: what may stand behind the end of a row: the end's own token, or padding; beam search fills with either
FILLERS = (0, 1)


@dataclass(frozen=True)
class Difference:
    """The first token that differs in a row.

    Attributes:
        row: of the batch. step: of the new tokens, from 0. got, expected: tokens, None behind the end of a row.
        gap: between the two best expected logits, and `spread`, their standard deviation; None where they are not known.
    """

    row: int
    step: int
    got: int | None
    expected: int | None
    gap: float | None = None
    spread: float | None = None

    def __str__(self) -> str:
        text = f"row {self.row}, step {self.step}: {self.got} against {self.expected}"
        if self.gap is None or self.spread is None:
            return text
        return f"{text}, the two best logits {self.gap:.3g} apart ({self.gap / self.spread:.2g} of their spread)"


def stripped(row: Sequence[int]) -> list[int]:
    """A row without its trailing ends and padding."""
    last = len(row)
    while last > 0 and row[last - 1] in FILLERS:
        last -= 1
    return list(row[:last])


def differences(
    got: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    gaps: Callable[[int, int], tuple[float, float]] | None = None,
) -> list[Difference]:
    """The first difference of every row that differs.

    Args:
        got: rows of tokens, of any lengths, each with its start token.
        expected: as many.
        gaps: (row, step) -> gap and spread of the expected logits, see `Difference`.
    """
    found = []
    for number, (mine, theirs) in enumerate(zip(map(stripped, got), map(stripped, expected), strict=True)):
        if mine == theirs:
            continue
        place = next(
            (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
        )
        tokens = [row[place] if place < len(row) else None for row in (mine, theirs)]
        step = max(place - 1, 0)
        found.append(Difference(number, step, *tokens, *(gaps(number, step) if gaps else ())))
    return found


def equal_rows(got: torch.Tensor, expected: torch.Tensor) -> int:
    """How many rows [R, tokens] are equal."""
    return len(expected) - len(differences(got.tolist(), expected.tolist()))


def greedy_gaps(logits: Sequence[torch.Tensor]) -> Callable[[int, int], tuple[float, float]]:
    """`differences`' `gaps` out of a greedy result's logits, one [R, V] for every step."""

    def gap(row: int, step: int) -> tuple[float, float]:
        scores = logits[step][row].float()
        best = scores.topk(2).values
        return float(best[0] - best[1]), float(scores.std())

    return gap
