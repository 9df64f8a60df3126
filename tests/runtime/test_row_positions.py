"""Decoder steps of rows that stand at positions of their own over sources of their own."""

from __future__ import annotations

from typing import Any

import pytest

from t5_trt.graph.build_graph import build_device_graph
from t5_trt.graph.precision import real_type
from t5_trt.graph.signature import STEP
from t5_trt.runtime.row_buffers import KEPT_STEPS
from tests.row_cases import LENGTHS, Alone, check_row_taken_over, step


def test_rows_that_join_and_leave_get_the_logits_of_a_cache_of_their_own(pair: tuple[Any, Any]) -> None:
    session = pair[1].session
    rows, alone = session.row_buffers(4), [Alone(session, length, seed) for seed, length in enumerate(LENGTHS)]
    inside: list[Alone] = []
    for each in alone:  # the longest source joins second: all are moved into wider buffers
        each.enter(rows)
        inside.append(each)
        for _ in range(3):
            step(session, rows, inside)
    for place in (1, 0):  # the last row takes the place
        rows.remove(place)
        inside[place] = inside[-1]
        inside.pop()
        step(session, rows, inside)
    for _ in range(KEPT_STEPS):
        rows.fit()
    assert rows.source_capacity == 32 and rows.positions[:2].tolist() == [rows.position(0), rows.position(1)]
    late = Alone(session, 30, 9)
    late.enter(rows)
    step(session, rows, [*inside, late])


def test_a_row_taken_over_gets_the_logits_of_a_cache_of_its_own(v11: tuple[Any, Any]) -> None:
    check_row_taken_over(v11[1].session)


def test_caches_grow_with_the_longest_row_and_shrink_after_it(v11: tuple[Any, Any]) -> None:
    session = v11[1].session
    rows, long, short = session.row_buffers(2), Alone(session, 5, 0), Alone(session, 6, 1)
    long.enter(rows)
    for _ in range(70):
        step(session, rows, [long])
    assert rows.capacity == 128
    short.enter(rows)
    step(session, rows, [long, short])
    rows.remove(0)
    step(session, rows, [short])
    assert rows.capacity == 128  # the next request may be as long
    for _ in range(KEPT_STEPS):
        step(session, rows, [short])
    assert rows.capacity == 64


def test_room_that_is_given_up_does_not_keep_rows_from_growing(v11: tuple[Any, Any]) -> None:
    session = v11[1].session
    rows, long, short = session.row_buffers(2), Alone(session, 40, 0), Alone(session, 6, 1)
    long.enter(rows)
    short.enter(rows)
    step(session, rows, [long, short])
    rows.remove(0)
    for _ in range(KEPT_STEPS + 70):
        step(session, rows, [short])
    assert rows.source_capacity == 16 and rows.capacity == 128


def test_values_of_a_row_that_has_left_reach_nobody(v11: tuple[Any, Any]) -> None:
    session = v11[1].session
    rows, first, second = session.row_buffers(2), Alone(session, 12, 0), Alone(session, 6, 1)
    first.enter(rows)
    for _ in range(3):
        step(session, rows, [first])
    rows.kv[:, :, 0, :, :3] = float("nan")  # an overflow in one request
    rows.cross[:, :, 0, :, :12] = float("inf")
    rows.remove(0)
    second.enter(rows)
    step(session, rows, [second])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_device_form_keeps_one_position_for_all_rows(v11: tuple[Any, Any], precision: str) -> None:
    model = build_device_graph(STEP, v11[1].architecture, real_type(precision))
    (position,) = [value for value in model.graph.inputs if value.name == "position"]
    assert list(position.shape or ()) == [1]
