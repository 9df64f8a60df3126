"""Rows at positions of their own by the kernels' decoder: buffers and captured steps. Torch stands in for the kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt.runtime import kernel_rows
from t5_trt.runtime.kernel_rows import padded_count
from t5_trt.runtime.row_buffers import KEPT_STEPS
from tests.row_cases import LENGTHS, Alone, check_row_taken_over, step
from tests.stand_in_kernels import kernels_pair


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, Any]:
    return kernels_pair(monkeypatch, tmp_path)


@pytest.fixture
def session(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(kernel_rows.KernelRowBuffers, "smallest", (8, 8))  # so that all grows soon
    return pair[1].session


def test_rows_that_join_and_leave_get_the_logits_of_a_cache_of_their_own(session: Any) -> None:
    rows, alone = session.row_buffers(4), [Alone(session, length, seed) for seed, length in enumerate(LENGTHS)]
    inside: list[Alone] = []
    for each in alone:
        each.enter(rows)
        inside.append(each)
        for _ in range(5):
            step(session, rows, inside)
    assert (rows.capacity, rows.source_capacity) == (32, 64)
    for place in (1, 0):  # the last row takes the place
        rows.remove(place)
        inside[place] = inside[-1]
        inside.pop()
        step(session, rows, inside)
    late = Alone(session, 30, 9)
    late.enter(rows)
    step(session, rows, [*inside, late])


def test_a_row_taken_over_gets_the_logits_of_a_cache_of_its_own(session: Any) -> None:
    check_row_taken_over(session)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 8), (torch.bfloat16, 6), (torch.float32, 5)])
def test_sources_are_copied_whole_whatever_the_width_of_heads(session: Any, dtype: torch.dtype, width: int) -> None:
    arch = replace(session.arch, d_kv=width)
    rows = kernel_rows.KernelRowBuffers(arch, 3, dtype=dtype, hidden=-1e4, device=torch.device("cpu"))
    packed = torch.randn((arch.decoder_layers, 2, 1, arch.num_heads, 40, width)).to(dtype)
    parts = [packed[:, :, 0, :, begin:end] for begin, end in ((0, 7), (7, 40), (39, 40))]
    for part in parts:
        rows.add(part, torch.zeros(part.shape[3]))
    rows.remove(0)
    for row, part in ((0, parts[2]), (1, parts[1])):
        assert torch.equal(rows.cross[:, :, row, :, : part.shape[3]], part)


def test_best_tokens_are_those_of_the_logits(session: Any) -> None:
    rows, alone = session.row_buffers(3), [Alone(session, length, seed) for seed, length in enumerate((3, 20, 9))]
    tokens = [5, 6, 7]
    for each in alone:
        each.enter(rows)
    for number in range(6):
        rows.fit()
        if number % 3:
            rows.follow()
        else:
            rows.feed(tokens)
        found = session.step_rows(rows, best_only=True).tolist()
        inputs = (torch.tensor([[token]]) for token in tokens)
        tokens = [int(session.decode(each.state, fed).argmax()) for each, fed in zip(alone, inputs, strict=True)]
        assert found == tokens


def test_a_step_is_captured_once_for_a_number_of_rows_and_room(session: Any) -> None:
    rows, alone = session.row_buffers(16), [Alone(session, 5, seed) for seed in range(12)]
    inside: list[Alone] = []
    captured = set()
    for each in alone:
        each.enter(rows)
        inside.append(each)
        step(session, rows, inside)
        captured |= {key for key in rows.bindings if key != "buffers"}
    assert captured == {(count, False) for count in (1, 2, 4, 8, 16)}
    assert {padded_count(count, 20) for count in range(1, 21)} == {1, 2, 4, 8, 16, 20}


def test_room_is_given_up_once_an_eighth_would_do(session: Any) -> None:
    rows, long, short = session.row_buffers(2), Alone(session, 70, 0), Alone(session, 20, 1)
    long.enter(rows)
    step(session, rows, [long])
    short.enter(rows)
    step(session, rows, [long, short])
    rows.remove(0)
    step(session, rows, [short])
    assert rows.source_capacity == 128  # 32 is more than an eighth
    rows.remove(0)
    Alone(session, 4, 2).enter(rows)
    for _ in range(KEPT_STEPS):
        rows.fit()
    assert rows.source_capacity == 128
    rows.fit()
    assert rows.source_capacity == 8


def test_a_row_that_has_left_reaches_nobody(session: Any) -> None:
    rows, first, second = session.row_buffers(2), Alone(session, 12, 0), Alone(session, 6, 1)
    first.enter(rows)
    for _ in range(3):
        step(session, rows, [first])
    rows.kv.fill_(torch.nan)  # an overflow in one request
    rows.cross.fill_(torch.nan)
    rows.remove(0)
    second.enter(rows)
    step(session, rows, [second])
