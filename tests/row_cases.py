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
        self.ids = torch.randint(2, VOCAB, (1, length), generator=self.generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[0, length // 3] = 0
        _, self.cross = session.encode(self.ids, None, self.mask)
        self.state = session.start(self.cross, 1, self.mask)

    def enter(self, rows: RowBuffers) -> None:
        rows.add(self.cross.kv[:, :, 0], self.session.cross_bias(self.mask, self.cross)[0, 0, 0])

    def token(self) -> int:
        return int(torch.randint(2, VOCAB, (1,), generator=self.generator))


def step(session: RowSession, rows: RowBuffers, alone: list[Alone]) -> None:
    """One step of all rows, compared with each row's own."""
    rows.fit()
    tokens = torch.tensor([each.token() for each in alone])
    rows.feed(tokens.tolist())
    found = session.step_rows(rows)
    for row, each in enumerate(alone):
        expected = each.session.decode(each.state, tokens[row].view(1, 1))[0, 0]
        torch.testing.assert_close(found[row], expected, atol=LOGITS_ATOL, rtol=0)
        assert rows.position(row) == each.state.length
