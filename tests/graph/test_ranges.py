"""Half precision that cannot overflow: factors in the weights, on graphs that torch computes in float16 node by node."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch

from benchmarks.engine_text import larger
from t5_trt import InputError, RuntimeConfig, TRTT5ForConditionalGeneration
from t5_trt.checkpoint.tokenizing import text_batches
from t5_trt.graph import fp16_scaling
from t5_trt.graph.build_graph import build_device_graph
from t5_trt.graph.fp16_scaling import LIMIT, Fp16Scaling, Ranges, bound, find_scaling
from t5_trt.graph.parameters import EMBEDDING, LM_HEAD
from t5_trt.graph.signature import ENCODER, STEP
from t5_trt.modeling.calibration import observe, random_batches
from t5_trt.runtime import open_session as opening
from t5_trt.runtime import select
from t5_trt.runtime.select import best_precision
from t5_trt.tools.random_models import random_t5
from tests.conftest import SHIPPED
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import FACTORS, KINDS, batch, large_logits, make_hugging_face, swollen
from tests.torch_graph import NotFiniteError

HALF_RELATIVE = (
    0.02  # L2 of the logits' error, as the tiny models have it in Hugging Face's half precision too (up to 0.009)
)
FOLDED_RELATIVE = 1e-4  # the same function in float32, other roundings
EXTREME = (300.0, 1e5)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(2, 200, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(**batch(), decoder_input_ids=ids).logits.float()  # type: ignore[no-any-return]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
def encoded_embeds(model: Any) -> torch.Tensor:
    """What an encoder makes of embeddings that come from outside, without padding."""
    inputs = batch()
    embeds = model.shared(inputs.pop("input_ids"))
    states: torch.Tensor = model.get_encoder()(inputs_embeds=embeds, **inputs).last_hidden_state
    return states[inputs["attention_mask"].bool()]


def scaling_of(ours: Any) -> Fp16Scaling:
    """What opening a session in half precision would take."""
    scaling = find_scaling(ours.architecture, ours.state_dict())
    return scaling if scaling.certain else find_scaling(ours.architecture, ours.state_dict(), ours._runner.observe())


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_overflowing_checkpoints(kind: str, factors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain half precision fails on them; folded, every value of every node is finite and the logits are right."""
    if kind == "few-buckets" and factors[0] > 1e3:
        factors = (100.0, 1e4)  # gelu between its matrices: its inside cannot be scaled
    hugging_face = swollen(make_hugging_face(kind), *factors)
    expected = logits(hugging_face)
    half = logits(copy.deepcopy(hugging_face).half())
    assert not half.isfinite().all() or relative(half, expected) > 0.5
    if factors[0] == 3e4:  # inside a layer
        assert half.isnan().any()
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    ours.session = stand_in_session(ours, monkeypatch, precision="fp16")
    with pytest.raises(NotFiniteError):
        logits(ours)
    scaling = scaling_of(ours)
    ours.session = stand_in_session(ours, monkeypatch, precision="fp16", scaling=scaling)
    assert relative(logits(ours), expected) < HALF_RELATIVE
    ours.session = stand_in_session(ours, monkeypatch, scaling=scaling)
    assert scaling != Fp16Scaling() and relative(logits(ours), expected) < FOLDED_RELATIVE


@pytest.mark.parametrize("least", [None, 8.0], ids=["by bounds", "observed"])
def test_extreme_values(least: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of 6e8 over an embedding of 0.2; where bounds would cost too much precision activations are observed."""
    if least is not None:
        monkeypatch.setattr(fp16_scaling, "_LEAST", least)
    hugging_face = swollen(make_hugging_face("mt5"), *EXTREME)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    assert find_scaling(ours.architecture, ours.state_dict()).certain == (least is None)
    ours.session = stand_in_session(ours, monkeypatch, precision="fp16", scaling=scaling_of(ours))
    assert relative(logits(ours), logits(hugging_face)) < HALF_RELATIVE


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1"])
def test_tokens_and_given_embeddings(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy steps over a half precision cache, and embeddings that come from outside."""
    hugging_face = swollen(make_hugging_face(kind), 100.0, 1e4)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    ours.session = stand_in_session(ours, monkeypatch, precision="fp16", scaling=scaling_of(ours))
    request = {**batch(), "max_new_tokens": 6, "min_new_tokens": 6}
    got = ours.generate(**request, output_scores=True, return_dict_in_generate=True)
    scores = hugging_face.generate(**request, output_scores=True, return_dict_in_generate=True).scores
    assert relative(got.scores[0][:, 2:], scores[0][:, 2:]) < HALF_RELATIVE and len(got.scores) == 6
    assert relative(encoded_embeds(ours).float(), encoded_embeds(hugging_face)) < HALF_RELATIVE


@pytest.mark.parametrize("factors", [{}, {"inner": 2.0**15}, {"stream": 2.0**12}], ids=str)
def test_t5_base_shapes(factors: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve layers of published width; four tokens, because torch computes float16 slowly on some CPUs."""
    hugging_face = larger(random_t5("t5-base"), **factors)
    ids, tokens = torch.arange(100, 116)[None], torch.tensor([[0, 8, 9, 10]])
    with torch.no_grad():
        expected = hugging_face(input_ids=ids, decoder_input_ids=tokens).logits
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face)
    ours.session = stand_in_session(ours, monkeypatch, precision="fp16", scaling=scaling_of(ours))
    got = ours(input_ids=ids, decoder_input_ids=tokens).logits
    assert relative(got, expected) < HALF_RELATIVE


@pytest.mark.parametrize("factor", [2.0**15, 2.0**18], ids=["logits", "embeddings too"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_large_embeddings_and_logits(kind: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings and a head (often the same tensor) whose values, or whose products, are beyond half precision."""
    hugging_face = large_logits(make_hugging_face(kind), factor)
    expected = logits(hugging_face)
    assert not logits(copy.deepcopy(hugging_face).half()).isfinite().all()
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    ours.session = stand_in_session(ours, monkeypatch, precision="fp16")
    with pytest.raises(NotFiniteError):
        logits(ours)
    scaling = scaling_of(ours)
    assert scaling.branches["lm_head"] < 1 and (scaling.embedding < 1) == (factor == 2**18)
    ours.session = stand_in_session(ours, monkeypatch, precision="fp16", scaling=scaling)
    assert relative(logits(ours), expected) < HALF_RELATIVE
    assert relative(encoded_embeds(ours).float(), encoded_embeds(hugging_face)) < HALF_RELATIVE
    ours.session = stand_in_session(ours, monkeypatch, scaling=scaling)
    assert relative(logits(ours), expected) < FOLDED_RELATIVE


def test_streams_have_their_own_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `compare` shows of layers is not multiplied by the stream's factor."""
    hugging_face = large_logits(make_hugging_face("t5-v1.1"), 2.0**18)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    plain, folded = (
        stand_in_session(ours, monkeypatch, scaling=scaling).layer_outputs(ENCODER, batch())
        for scaling in (Fp16Scaling(), scaling_of(ours))
    )
    assert len(plain) == 3 and all(relative(folded[name], plain[name]) < FOLDED_RELATIVE for name in plain)


def test_nothing_stands_between_the_last_norm_and_the_head() -> None:
    """TensorRT 8.5 is free to multiply after the product, where half precision may have no room."""
    arch = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0")).architecture
    graph = build_device_graph(STEP, arch, ir.DataType.FLOAT16, fixed={"B": 1, "N": 1, "R": 1, "S": 32, "T": 64}).graph
    nodes = [node.op_type for node in graph if (node.name or "").startswith("lm_head/")]
    assert arch.output_scale < 1 and nodes[-5:] == ["Div", "Cast", "MatMul", "Reshape", "Cast"] and "Mul" not in nodes


@pytest.mark.parametrize("kind", list(KINDS))
def test_bounds_hold(kind: str) -> None:
    """What is observed stays below them, for ordinary and for large weights."""
    for hugging_face in (make_hugging_face(kind), swollen(make_hugging_face(kind), 30.0, 1e3)):
        ours = TRTT5ForConditionalGeneration.from_model(hugging_face)
        bounds = bound(ours.architecture, ours.state_dict())
        seen = observe(hugging_face, [batch(), batch(2, 30, seed=7)])
        assert all(
            seen.branches[name] <= largest < 1e5 * seen.branches[name] for name, largest in bounds.branches.items()
        )
        assert set(seen.branches) == set(bounds.branches)
        assert all(seen.inner[layer] <= largest for layer, largest in bounds.inner.items())
        scales = hugging_face.config.feed_forward_proj != "gelu"
        assert len(bounds.inner) == (len(seen.inner) if scales else 0)


def test_ordinary_checkpoints_are_left_alone() -> None:
    for hugging_face in (make_hugging_face("t5-v1.1"), random_t5("t5-base")):
        ours = TRTT5ForConditionalGeneration.from_model(hugging_face)
        assert find_scaling(ours.architecture, ours.state_dict()) == Fp16Scaling()


def test_factors() -> None:
    dense, attention = "encoder.block.0.layer.1.DenseReluDense", "decoder.block.3.layer.1.EncDecAttention"
    scaling = Fp16Scaling(
        True, 1.0, {f"{dense}.wo": 2**-4, f"{attention}.o": 2**-5}, {"encoder.block.0.layer.1": 2**-3}
    )

    def factor(key: str, group: str = "a matrix") -> float:
        return scaling.factor(group, key)

    assert factor(f"{attention}.o.weight") == 2**-5 and factor(f"{attention}.q.weight") == 1.0
    assert [factor(f"{dense}.{name}.weight") for name in ("wi", "wi_0", "wi_1", "wo")] == [2**-3, 1, 2**-3, 0.5]
    assert factor("encoder.block.1.layer.1.DenseReluDense.wo.weight") == 1.0
    assert factor("encoder.final_layer_norm.weight") == 1.0
    assert factor("shared.weight", EMBEDDING) == factor("shared.weight", LM_HEAD) == 1.0
    tied = Fp16Scaling(True, 2**-3, {"lm_head": 2**-7})
    assert tied.factor(EMBEDDING, "shared.weight") == 2**-3 and tied.factor(LM_HEAD, "shared.weight") == 2**-7


def test_seen_ranges_get_headroom() -> None:
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"))
    bounds = bound(ours.architecture, ours.state_dict())
    seen = Ranges(dict.fromkeys(bounds.branches, 1e6), dict.fromkeys(bounds.inner, 1e5))
    scaling = find_scaling(ours.architecture, ours.state_dict(), seen)
    assert all(factor * 1e6 * 4 < LIMIT <= factor * 1e6 * 16 for factor in scaling.branches.values())
    assert all(factor * 1e5 * 4 < LIMIT for factor in scaling.inner.values())
    assert len(scaling.inner) == len(bounds.inner) and len(scaling.branches) == len(bounds.branches)


def test_calibration_goes_before_bounds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Texts of the user's decide, and are looked at when the session opens, not when the model is loaded."""
    asked = []
    monkeypatch.setattr(opening, "find_scaling", lambda arch, weights, seen=None: asked.append(seen) or Fp16Scaling())
    monkeypatch.setattr(opening, "gpu_facts", lambda device: {})
    monkeypatch.setattr(opening, "load_tensorrt", lambda flavor: None)
    monkeypatch.setattr(opening, "EngineProvider", lambda *args, **kwargs: None)
    opened = SimpleNamespace(scaling=None)
    monkeypatch.setattr(opening, "TrtSession", lambda *args, **kwargs: opened)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, calibration=["さくら", "とうきょう"])
    runner = ours._runner
    calibration = runner.settings.calibration
    assert calibration is not None and len(calibration) == 1 and calibration[0]["input_ids"].shape[0] == 2
    placement = replace(runner.placement, backend="tensorrt", precision="fp16", flavor="tensorrt")
    runner.settings = replace(runner.settings, placement=placement)
    assert ours.session is opened  # type: ignore[comparison-overlap]
    assert len(asked) == 1 and isinstance(asked[0], Ranges) and 0.0 < max(asked[0].branches.values()) < 1e5


def test_bad_calibration() -> None:
    for texts in ([], [3]):
        with pytest.raises(InputError, match=r"texts(\[0\])? got"):
            list(text_batches(None, texts, pad_token_id=0))


def test_observed_names() -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    seen = observe(hugging_face, random_batches(200), max_new_tokens=2)
    assert {"encoder.block.0.layer.0.SelfAttention.o", "decoder.block.1.layer.2.DenseReluDense.wo"} < set(seen.branches)
    assert set(seen.inner) == {
        f"{stack}.block.{n}.layer.{k}" for stack, k in (("encoder", 1), ("decoder", 2)) for n in (0, 1)
    }
    assert min(*seen.branches.values(), *seen.inner.values()) > 0
    assert not any(module._forward_hooks for module in hugging_face.modules())


def test_precision_that_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 on a GPU, bf16 for a checkpoint that was trained in it where TensorRT has it; fp32 on a CPU."""

    def check(precision: str) -> None:
        if precision == "bf16" and not has_bf16:
            raise InputError("no bfloat16")

    api = SimpleNamespace(check_precision=check, version="10.0", flavor="tensorrt")
    assert (
        best_precision(RuntimeConfig(), torch.bfloat16) == "auto"
        and select.resolve(RuntimeConfig()).precision == "fp32"
    )
    monkeypatch.setattr(select, "load_tensorrt", lambda flavor=None: api)
    monkeypatch.setattr(select, "why_not_tensorrt", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    has_bf16 = True
    assert best_precision(RuntimeConfig(), torch.bfloat16) == "bf16"
    assert best_precision(RuntimeConfig(), torch.float32) == "auto"
    assert best_precision(RuntimeConfig(precision="fp32"), torch.bfloat16) == "fp32"
    assert select.resolve(RuntimeConfig()).precision == "fp16"
    has_bf16 = False
    assert best_precision(RuntimeConfig(), torch.bfloat16) == "auto"
