"""The buffers of a request: buckets, growth that keeps contents, reordering, selecting."""

from __future__ import annotations

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
