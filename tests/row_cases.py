"""Rows that decode side by side, each compared with the same source in a cache of its own."""

from __future__ import annotations

from typing import Any

import torch

from t5_trt.runtime.row_buffers import RowBuffers, RowSession
from tests.tiny_models import VOCAB
from tests.tolerances import LOGITS_ATOL

LENGTHS = (3, 40, 11, 17)


class Alone:
    """What a row of the buffers must do: the same source and tokens in a cache of their own."""

    def __init__(self, session: Any, length: int, seed: int) -> None:
        self.session, self.generator = session, torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCAB, (1, length), generator=self.generator).to(session.device)
        mask = torch.ones_like(ids)
        mask[0, length // 3] = 0
        _, cross = session.encode(ids, None, mask)
        self.state = session.start(cross, 1, mask)
        # copies: on a GPU the next source is encoded into the same memory
        self.kv = cross.kv[:, :, 0, :, :length].clone()
        self.bias = session.cross_bias(mask, cross)[0, 0, 0, :length].clone()

    def enter(self, rows: RowBuffers) -> None:
        rows.add(self.kv, self.bias)

    def logits(self, token: int) -> torch.Tensor:
        made: torch.Tensor = self.session.decode(self.state, torch.tensor([[token]], device=self.session.device))
        return made[0, 0]

    def token(self) -> int:
        return int(torch.randint(2, VOCAB, (1,), generator=self.generator))


def step(session: RowSession, rows: RowBuffers, alone: list[Alone], atol: float = LOGITS_ATOL) -> None:
    """One step of all rows, compared with each row's own; `atol` 0 asks for equal bits."""
    rows.fit()
    tokens = [each.token() for each in alone]
    rows.feed(tokens)
    found = session.step_rows(rows)
    for row, each in enumerate(alone):
        torch.testing.assert_close(found[row], each.logits(tokens[row]), atol=atol, rtol=0)
        assert rows.position(row) == each.state.length


def check_row_taken_over(session: Any) -> None:
    """A new source takes the row of a request that has overflowed; every step is compared with each row's own."""
    rows, inside = session.row_buffers(3), [Alone(session, length, length) for length in (12, 30, 7)]
    for each in inside:
        each.enter(rows)
    for _ in range(3):
        step(session, rows, inside)
    rows.kv[:, :, 1, :, :3] = float("nan")  # an overflow in the request that leaves
    inside[1] = Alone(session, 9, 5)
    rows.add(inside[1].kv, inside[1].bias, 1)
    assert rows.count == 3 and rows.position(1) == 0
    for _ in range(3):
        step(session, rows, inside)
