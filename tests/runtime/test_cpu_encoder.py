"""The encoder's C code against ONNX Runtime's graphs: states, K and V, masks, embeddings, 8 bits, weights that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t5_trt import TRTT5EncoderModel
from t5_trt.config import default_engine_cache_dir
from t5_trt.engine.store import EngineStore
from t5_trt.errors import InputError
from t5_trt.graph.int8 import quantize
from t5_trt.graph.parameters import CROSS_KV, parameters
from t5_trt.kernels import cpu_weights
from t5_trt.kernels.cpu_compile import load_library
from t5_trt.runtime import cpu_steps
from t5_trt.runtime.onnxruntime_session import OrtSession
from tests.conftest import SHIPPED, pair_of
from tests.runtime.test_cpu_steps import TEAMS, sessions_of
from tests.tiny_models import KINDS, VOCAB, batch

#: sums in another order; both are as far from float64
CLOSE = {"atol": 5e-5, "rtol": 2e-5}
#: of the length of states, keys and values, where rows are rounded to 8 bits
CLOSE_INT8 = 0.2
BY_C_CODE = ("encoder (C code)",)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C code encodes calls of any number of tokens."""
    monkeypatch.setattr(cpu_steps, "ENCODED_TOKENS", 10**6)
    monkeypatch.setattr(cpu_steps, "ENCODED_TOKENS_INT8", 10**6)
    monkeypatch.setattr(cpu_steps, "ENCODED_TOKENS_CACHED", 10**6)


def encoded(session: OrtSession, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[Any, Any]:
    """States, and K and V."""
    hidden, cross = session.encode(ids, None, torch.ones_like(ids) if mask is None else mask)
    return hidden, cross.kv


def ids_of(rows: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 26), (3, 11), (2, 53)])
def test_states_and_keys_are_those_of_the_graphs(kind: str, rows: int, tokens: int) -> None:
    """Up to sources with distances that share the last bucket (few-buckets), and with any remainder of blocks."""
    ours = pair_of(kind)[1]
    own, graphs = sessions_of(ours.architecture, ours.state_dict(), threads=2)
    ids = ids_of(rows, tokens)
    for got, expected in zip(encoded(own, ids), encoded(graphs, ids), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    assert own.loaded_graphs() == BY_C_CODE and graphs.loaded_graphs() == ("encoder",)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind: str) -> None:
    """Hidden tokens behind a source, before it and inside it; a source that is hidden as a whole attends to all its tokens alike."""
    ours = pair_of(kind)[1]
    own, graphs = sessions_of(ours.architecture, ours.state_dict())
    ids, mask = ids_of(5, 19), torch.ones(5, 19, dtype=torch.int64)
    mask[1, 12:], mask[2, :7], mask[3, 4:9], mask[4] = 0, 0, 0, 0
    for got, expected in zip(encoded(own, ids, mask), encoded(graphs, ids, mask), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["t5-v1.1", "mt5"])
def test_embeddings_and_given_states(kind: str) -> None:
    ours = pair_of(kind)[1]
    own, graphs = sessions_of(ours.architecture, ours.state_dict())
    given = batch()
    embeddings = ours.state_dict()["shared.weight"][given["input_ids"]]
    hidden, cross = own.encode(None, embeddings, given["attention_mask"])
    by_ids = encoded(own, given["input_ids"], given["attention_mask"])
    assert torch.equal(hidden, by_ids[0]) and torch.equal(cross.kv, by_ids[1])
    assert torch.equal(own.project_cross(hidden).kv, cross.kv)
    apart = torch.randn(3, 5, ours.architecture.d_model).transpose(0, 1)
    torch.testing.assert_close(own.project_cross(apart).kv, graphs.project_cross(apart).kv, **CLOSE)
    assert own.loaded_graphs() == BY_C_CODE


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_in_8_bits(kind: str) -> None:
    """Also those that are shifted by 128 for processors whose products saturate."""
    ours = pair_of(kind)[1]
    arch, weights = ours.architecture, ours.state_dict()
    quantized = dict(quantize(arch, weights))
    own, graphs = sessions_of(arch, weights, quantized, threads=2)
    shifted = {
        name: (made.short() + 128).to(torch.uint8) if made.dtype == torch.int8 else made
        for name, made in quantized.items()
    }
    widened = dict(weights)
    for name, parameter in parameters(arch).items():
        if (name.startswith("encoder.block") or name == CROSS_KV) and f"{name}.int8" in quantized:
            matrix = (quantized[f"{name}.int8"].float() * quantized[f"{name}.scale"]).t()
            widened |= {key: matrix[parameter.place(key)].contiguous() for key in parameter.parts}
    ids = ids_of(3, 13)
    found = encoded(own, ids)
    by_shifted = encoded(sessions_of(arch, weights, shifted)[0], ids)
    by_graphs, only_weights_rounded = encoded(graphs, ids), encoded(sessions_of(arch, widened)[0], ids)
    for got, other, expected, rounded in zip(found, by_shifted, by_graphs, only_weights_rounded, strict=True):
        assert torch.equal(got, other)
        assert (got - expected).norm() < CLOSE_INT8 * expected.norm()
        # each row has a scale of its own here, and all rows have one there
        assert (got - rounded).norm() < (expected - rounded).norm()


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "mt5", "umt5"])
@pytest.mark.parametrize("in_8_bits", [False, True])
def test_bits_of_a_source_do_not_depend_on_threads_nor_other_sources_nor_padding(
    kind: str, in_8_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = pair_of(kind)[1]
    arch, weights = ours.architecture, ours.state_dict()
    quantized = dict(quantize(arch, weights)) if in_8_bits else None
    length, source = 29, ids_of(1, 29)
    hidden, kv = encoded(sessions_of(arch, weights, quantized)[0], source)
    for threads, spinning, cached in TEAMS:
        monkeypatch.setattr(cpu_weights, "CACHED_BYTES", cached)
        session = sessions_of(arch, weights, quantized, threads=threads, spinning=spinning)[0]
        for rows, padding in ((1, 0), (1, 1), (2, 3), (3, 20), (8, 7), (16, 4)):
            ids = ids_of(rows, length + padding, seed=rows)
            mask = torch.ones_like(ids)
            ids[-1, :length], mask[-1, length:] = source[0], 0
            states, keys = encoded(session, ids, mask)
            assert torch.equal(states[-1, :length], hidden[0]) and torch.equal(keys[:, :, -1, :, :length], kv[:, :, 0])


@pytest.mark.parametrize("in_8_bits", [False, True])
def test_weights_that_change_are_read(in_8_bits: bool) -> None:
    ours = pair_of("t5-v1.1")[1]
    arch, weights = ours.architecture, {key: value.detach().clone() for key, value in ours.state_dict().items()}
    quantized = dict(quantize(arch, weights)) if in_8_bits else None
    changing = [
        "encoder.block.1.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.layer_norm.weight",
        "decoder.block.1.layer.1.EncDecAttention.v.weight",
    ]
    own = sessions_of(arch, weights, quantized)[0]
    library = load_library(EngineStore(default_engine_cache_dir(), None))
    known = OrtSession(arch, weights, num_threads=1, quantized=quantized, changing=changing, library=library)
    ids = ids_of(2, 9)
    before = encoded(own, ids)
    assert torch.equal(encoded(known, ids)[1], before[1])
    for key in changing:
        weights[key].mul_(1.5)
    for session in (known, own):
        session.update_weights({key: weights[key] for key in changing})
        anew = dict(quantize(arch, weights)) if in_8_bits else None
        for got, expected, old in zip(
            encoded(session, ids), encoded(sessions_of(arch, weights, anew)[0], ids), before, strict=True
        ):
            assert torch.equal(got, expected) and not torch.equal(got, old)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("in_8_bits", [False, True])
def test_many_tokens_are_encoded_by_the_graphs(in_8_bits: bool, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them where the matrices stay in caches."""
    monkeypatch.setattr(cpu_weights, "CACHED_BYTES", 10**9 if cached else 0)
    ours = pair_of("t5-v1.1")[1]
    quantized = dict(quantize(ours.architecture, ours.state_dict())) if in_8_bits else None
    own = sessions_of(ours.architecture, ours.state_dict(), quantized)[0]
    most = cpu_steps.ENCODED_TOKENS_INT8 if in_8_bits else cpu_steps.ENCODED_TOKENS
    most = cpu_steps.ENCODED_TOKENS_CACHED if cached else most
    hidden, _ = encoded(own, ids_of(2, most // 2))
    own.project_cross(hidden)
    assert own.loaded_graphs() == BY_C_CODE
    hidden, _ = encoded(own, ids_of(1, most + 1))
    assert own.loaded_graphs() == ("encoder", *BY_C_CODE)
    own.project_cross(hidden)
    assert own.loaded_graphs() == ("encoder", "cross", *BY_C_CODE)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_tokens_outside_of_the_vocabulary_are_refused(token: int) -> None:
    ours = pair_of("t5-v1.1")[1]
    own, ids = sessions_of(ours.architecture, ours.state_dict())[0], ids_of(2, 5)
    expected = encoded(own, ids)[0]
    wrong = ids.clone()
    wrong[1, 4] = token
    with pytest.raises(InputError, match="out of range"):
        encoded(own, wrong)
    assert torch.equal(encoded(own, ids)[0], expected)


def test_an_encoder_without_a_decoder_is_run_by_the_graphs() -> None:
    encoder = TRTT5EncoderModel.from_pretrained(SHIPPED, num_threads=1)
    encoder(input_ids=ids_of(1, 5))
    assert encoder.session.loaded_graphs() == ("encoder",)
