"""The buffers of a request: buckets, growth that keeps contents, reordering, selecting."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t5_trt import InputError
from t5_trt.runtime.kv_buffers import CrossStates, DecoderState, bucket_length


def make_state(arch: Any, batch: int = 2, beams: int = 3, tokens: int = 5) -> DecoderState:
    torch.manual_seed(0)
    cross = CrossStates(torch.randn(arch.decoder_layers, 2, batch, arch.num_heads, 7, arch.d_kv), beams)
    state = DecoderState.allocate(arch, cross, torch.randn(batch, 1, 1, 7), tokens)
    state.append(torch.randn(arch.decoder_layers, 2, batch * beams, arch.num_heads, tokens, arch.d_kv))
    return state


@pytest.mark.parametrize(("tokens", "length"), [(0, 64), (1, 64), (64, 64), (65, 128), (128, 128), (1000, 1024)])
def test_buckets_double(tokens: int, length: int) -> None:
    assert bucket_length(tokens) == length


def test_growth_keeps_contents(v11: tuple[Any, Any]) -> None:
    state = make_state(v11[1].architecture, tokens=60)
    before = state.kv[..., :60, :].clone()
    state.binding = SimpleNamespace(of=bool)
    state.reserve(4)
    assert state.capacity == 64 and state.binding is not None
    state.reserve(5)
    assert state.capacity == 128 and state.binding is None
    assert torch.equal(state.kv[..., :60, :], before) and not state.kv[..., 60:, :].any()
    assert state.kv.is_contiguous() and state.kv.data_ptr() % 64 == 0


def test_reorder_within_a_source_moves_only_the_decoder(v11: tuple[Any, Any]) -> None:
    state = make_state(v11[1].architecture)
    rows = torch.tensor([2, 2, 0, 3, 5, 3])
    expected, cross = state.kv[:, :, rows, :, :5].clone(), state.cross
    state.reorder(rows)
    assert torch.equal(state.kv[..., :5, :], expected) and state.cross is cross


def test_beams_that_share_a_past_are_copied_from_where_they_part(v11: tuple[Any, Any]) -> None:
    arch = v11[1].architecture
    state, generator = make_state(arch, batch=2, beams=3, tokens=1), torch.Generator().manual_seed(1)
    expected = state.kv[..., :1, :].clone()
    for number in range(40):
        if number == 25:
            state.crop(9)
            expected = expected[..., :9, :]
        new = torch.randn(*expected.shape[:4], 1 + (number % 5 == 0), arch.d_kv)
        state.reserve(2)
        state.append(new)
        rows = torch.randint(0, 3, (2, 3), generator=generator) + torch.tensor([[0], [3]])
        state.reorder(rows.flatten())
        expected = torch.cat((expected, new), 4)[:, :, rows.flatten()]
        assert torch.equal(state.kv[..., : state.length, :], expected)
    state.kv[..., :3, :] = 7.0  # all beams have had this past in common for long
    state.reorder(torch.tensor([1, 1, 0, 3, 4, 5]))
    assert (state.kv[..., :3, :] == 7.0).all()
    memory = state.kv.clone()
    state.reorder(torch.arange(6))
    assert torch.equal(state.kv, memory)


def test_reorder_across_sources_takes_the_source_along(v11: tuple[Any, Any]) -> None:
    state = make_state(v11[1].architecture)
    rows = torch.tensor([5, 2, 0, 1, 4, 3])
    sources, bias = state.cross.kv[:, :, rows // 3].clone(), state.cross_bias[rows // 3].clone()
    state.reorder(rows)
    assert state.cross.beams == 1 and torch.equal(state.cross.kv, sources) and torch.equal(state.cross_bias, bias)


def test_crop(v11: tuple[Any, Any]) -> None:
    state = make_state(v11[1].architecture)
    state.crop(2)
    assert state.length == 2
    with pytest.raises(InputError, match="cache of 2 tokens to 3; expected 0 to 2"):
        state.crop(3)


def test_select_copies(v11: tuple[Any, Any]) -> None:
    state = make_state(v11[1].architecture)
    part = state.select(torch.tensor([4, 0]))
    assert part.rows == 2 and part.length == 5
    assert torch.equal(part.kv[..., :5, :], state.kv[:, :, [4, 0], :, :5])
    assert torch.equal(part.cross.kv, state.cross.kv[:, :, [1, 0]])
    part.kv.zero_()
    assert state.kv[..., :5, :].any()


def random_parents(generator: torch.Generator, batch: int, beams: int) -> torch.Tensor:
    rows = torch.randint(0, beams, (batch, beams), generator=generator)
    return (rows + torch.arange(batch)[:, None] * beams).flatten()


def same_tokens(state: DecoderState, expected: DecoderState) -> None:
    """Compare with a state that moves K and V; the state's own memory is not touched."""
    kept = copy.deepcopy(state.ancestors), state.kv.clone()
    state.materialize()
    assert state.ancestors is None and state.length == expected.length
    assert torch.equal(state.kv[..., : state.length, :], expected.kv[..., : state.length, :])
    state.ancestors, state.kv = kept


@pytest.mark.parametrize(("batch", "beams"), [(1, 4), (3, 2), (2, 5)])
def test_ancestors_move_as_copies_do(v11: tuple[Any, Any], batch: int, beams: int) -> None:
    arch, generator = v11[1].architecture, torch.Generator().manual_seed(batch)
    states = [make_state(arch, batch, beams, tokens=1) for _ in range(2)]
    by_ancestors, by_copies = states
    for number in range(150):  # beyond two buckets
        by_ancestors.use_ancestors()
        for state in states:
            if number == 40:
                state.crop(23)
            state.reserve(2)
        new = torch.randn(*by_copies.kv.shape[:4], 1 + number % 2, arch.d_kv, generator=generator)
        parents = random_parents(generator, batch, beams)
        memory = None
        for state in states:
            state.append(new)
            memory = state.kv.clone() if state.ancestors is not None else memory
            state.reorder(parents)
        assert by_copies.ancestors is None and memory is not None and torch.equal(by_ancestors.kv, memory)
        own = torch.arange(batch * beams) % beams
        assert (by_ancestors.ancestors[:, by_ancestors.length :] == own[:, None]).all()  # type: ignore[index]
        if number % 10 == 0:
            same_tokens(by_ancestors, by_copies)
        if number % 50 == 49:  # a reader of `kv` in between, which the next moves follow by copying or not
            by_ancestors.materialize()
            for state in states:
                state.reorder(parents)
    same_tokens(by_ancestors, by_copies)
    for entries in (torch.tensor([batch - 1]), torch.arange(batch).flip(0)):
        same_tokens(by_ancestors.select_entries(entries), by_copies.select_entries(entries))
    for rows in (torch.arange(batch * beams).flip(0), torch.tensor([1])):
        same_tokens(by_ancestors.select(rows), by_copies.select(rows))


def test_ancestors_end_where_rows_change_their_source(v11: tuple[Any, Any]) -> None:
    states = [make_state(v11[1].architecture) for _ in range(2)]
    states[0].use_ancestors()
    for rows in ([1, 1, 0, 5, 4, 4], [5, 2, 0, 1, 4, 3]):
        for state in states:
            state.reorder(torch.tensor(rows))
    assert states[0].ancestors is None and states[0].cross.beams == 1
    same_tokens(*states)
    states[0].use_ancestors()
    assert states[0].ancestors is None, "without beams there is nothing to move"


def test_ancestors_move_in_place(v11: tuple[Any, Any]) -> None:
    state = make_state(v11[1].architecture, beams=4)
    state.binding = SimpleNamespace(of=bool)
    state.use_ancestors()
    ancestors = state.ancestors
    state.reorder(torch.tensor([0, 0, 1, 1, 7, 6, 5, 4]))
    state.use_ancestors()
    assert ancestors is not None and state.ancestors is ancestors and state.binding is not None
    assert ancestors[:, :6].T.tolist() == [[0, 0, 1, 1, 3, 2, 1, 0]] * 5 + [[0, 1, 2, 3] * 2]


def test_a_byte_numbers_256_beams(v11: tuple[Any, Any]) -> None:
    for beams in (256, 257):
        state = make_state(v11[1].architecture, batch=1, beams=beams, tokens=1)
        state.use_ancestors()
        assert (state.ancestors is None) == (beams > 256)
        expected = state.kv[..., :1, :].flip(2)
        state.reorder(torch.arange(beams).flip(0))
        state.materialize()
        assert torch.equal(state.kv[..., :1, :], expected)
