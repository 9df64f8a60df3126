"""Engines that are built while requests are served, and the selector between an encoder engine and our own form, with TensorRT stood in for."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.config import RuntimeConfig
from t5_trt.errors import BackendError, InputError
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.runtime import encoder_forms, select
from t5_trt.runtime.encoder_forms import EncoderForms
from t5_trt.runtime.torch_layers import TorchEncoder
from tests.stand_in_tensorrt import StandInContext, StandInProvider, stand_in_session
from tests.tiny_models import batch, make_hugging_face

ENGINE_WINS, OWN_WINS = (1.0, 2.0), (2.0, 1.0)
FIXED = {"max_new_tokens": 6, "min_new_tokens": 6}


class Builds:
    """Holds builds of encoders until they may end, and counts who encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_end, self.by_engine = threading.Event(), 0
        self.times = ENGINE_WINS
        self.patch = monkeypatch
        real_plan, real_run = StandInProvider.plan, StandInContext.run

        def plan(provider: Any, graph: str, shapes: Any) -> bytes:
            if graph.startswith("encoder"):
                assert self.may_end.wait(30)
            return real_plan(provider, graph, shapes)

        def run(context: Any) -> None:
            self.by_engine += "input_ids" in context.addresses
            real_run(context)

        monkeypatch.setattr(StandInProvider, "plan", plan)
        monkeypatch.setattr(StandInContext, "run", run)
        monkeypatch.setattr(EncoderForms, "_times_ms", lambda forms, *key: self.times)

    def model(self, hugging_face: Any, *, background: bool = True, checked: bool = False) -> Any:
        ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
        own = lambda weights: TorchEncoder(ours.architecture, weights, Fp16Scaling(), "fp32")  # noqa: E731
        reference = ours.session if checked else None
        ours.session = stand_in_session(ours, self.patch, own_encoder=own, background=background, reference=reference)
        return ours


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Builds]:
    made = Builds(monkeypatch)
    yield made
    made.may_end.set()


def forms_of(ours: Any) -> EncoderForms:
    return ours.session._forms  # type: ignore[no-any-return]


def settle(ours: Any, builds: Builds) -> None:
    """Let the builds end, and wait until their engines are in use."""
    builds.may_end.set()
    forms_of(ours).wait()


def test_request_without_an_engine_is_served_at_once(builds: Builds) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    ours = builds.model(hugging_face)
    expected = hugging_face.generate(**batch(), **FIXED)
    for _ in range(3):
        assert torch.equal(ours.generate(**batch(), **FIXED), expected)
    assert not builds.by_engine and "encoder (torch)" in ours.session.loaded_graphs()
    settle(ours, builds)
    assert torch.equal(ours.generate(**batch(), **FIXED), expected) and builds.by_engine
    builds.by_engine = 0
    assert torch.equal(
        ours.generate(**batch(), num_beams=2, **FIXED), hugging_face.generate(**batch(), num_beams=2, **FIXED)
    )
    assert builds.by_engine
    encoders = [shapes for graph, shapes in ours.session.engines.provider.asked if graph == "encoder"]
    assert len(set(encoders)) == 1, "one size"


def test_slower_engine_is_unloaded(builds: Builds, caplog: pytest.LogCaptureFixture) -> None:
    hugging_face = make_hugging_face("t5-v1.0")
    ours, builds.times = builds.model(hugging_face), OWN_WINS
    with caplog.at_level(logging.INFO, "t5_trt"):
        ours.generate(**batch(), **FIXED)
        settle(ours, builds)
    assert "our own form 1.000; our own form serves it" in caplog.text
    assert torch.equal(ours.generate(**batch(), **FIXED), hugging_face.generate(**batch(), **FIXED))
    assert not builds.by_engine and "encoder" not in ours.session.loaded_graphs()
    provider = ours.session.engines.provider
    ((key, times),) = provider.kept.items()
    assert key[0] == "encoder" and times == {"engine": 2.0, "kernels": 1.0}
    again = builds.model(hugging_face)
    again.session.engines.provider.kept = provider.kept  # as another process finds them
    again.generate(**batch(), **FIXED)
    assert forms_of(again)._builder is None and again.session.engines.graphs() == ("decoder_step",)


@pytest.mark.parametrize("checked", [False, True])
def test_every_kind_of_input_in_the_background(builds: Builds, checked: bool) -> None:
    hugging_face = make_hugging_face("mt5")
    ours, builds.times = builds.model(hugging_face, checked=checked), OWN_WINS
    inputs = batch()
    with torch.no_grad():
        embeds = hugging_face.get_input_embeddings()(inputs["input_ids"])
        given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        expected = hugging_face.encoder(**given).last_hidden_state
        tokens = torch.randint(2, 90, (3, 4))
        for _ in range(2):
            got = ours.encoder(**given).last_hidden_state
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
            logits = ours(
                encoder_outputs=(expected,), attention_mask=inputs["attention_mask"], decoder_input_ids=tokens
            ).logits
            wanted = hugging_face(
                encoder_outputs=(expected,), attention_mask=inputs["attention_mask"], decoder_input_ids=tokens
            ).logits
            torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-3)
            settle(ours, builds)
    assert {graph for graph, _ in ours.session.engines.provider.kept} == {"encoder_embeds"}


def test_failed_build_causes_a_warning(
    builds: Builds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    ours = builds.model(hugging_face)
    real = StandInProvider.plan

    def plan(provider: Any, graph: str, shapes: Any) -> bytes:
        if graph == "encoder":
            raise BackendError("building encoder: out of memory.")
        return real(provider, graph, shapes)

    monkeypatch.setattr(StandInProvider, "plan", plan)
    for _ in range(3):
        assert torch.equal(ours.generate(**batch(), **FIXED), hugging_face.generate(**batch(), **FIXED))
        settle(ours, builds)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "no engine for encoder B4 S32: building encoder: out of memory. This process goes on" in record.getMessage()


def test_wrong_engine_is_never_used_and_causes_a_warning(
    builds: Builds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    ours = builds.model(hugging_face, checked=True)
    ours.generate(**batch(), **FIXED)  # the step's engine is checked too
    right = StandInContext.run

    def wrong(context: Any) -> None:
        right(context)
        for node, is_input in context.engine.io:
            if node.name == "encoder_hidden_states" and not is_input:
                context.memory(node, tuple(node.shape))[...] = 0.5

    monkeypatch.setattr(StandInContext, "run", wrong)
    settle(ours, builds)
    assert "computes wrong values" in caplog.text and ours.session.engines.provider.discarded
    assert torch.equal(ours.generate(**batch(), **FIXED), hugging_face.generate(**batch(), **FIXED))


@pytest.mark.parametrize(("times", "winner"), [(ENGINE_WINS, "encoder"), (OWN_WINS, "encoder (torch)")])
def test_waiting_request_gets_the_faster_form(builds: Builds, times: tuple[float, float], winner: str) -> None:
    """Without "background", where the backend was chosen by "auto"."""
    builds.may_end.set()
    hugging_face = make_hugging_face("t5-v1.1")
    ours, builds.times = builds.model(hugging_face, background=False, checked=True), times
    for _ in range(2):
        assert torch.equal(ours.generate(**batch(), **FIXED), hugging_face.generate(**batch(), **FIXED))
    graphs = ours.session.loaded_graphs()
    assert winner in graphs or winner == "encoder (torch)"
    assert ("encoder" in graphs) == (times == ENGINE_WINS) and forms_of(ours)._builder is None
    assert list(ours.session.engines.provider.kept.values()) == [dict(zip(("engine", "kernels"), times, strict=True))]


def test_engine_of_another_process_is_used_as_it_is(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    builds.may_end.set()
    monkeypatch.setattr(StandInProvider, "pop_unchecked", lambda *_: False)
    ours, builds.times = builds.model(make_hugging_face("t5-v1.1"), background=False), OWN_WINS
    ours.generate(**batch(), **FIXED)
    assert "encoder" in ours.session.loaded_graphs() and not ours.session.engines.provider.kept


def test_model_is_freed_while_an_engine_is_built(builds: Builds) -> None:
    ours = builds.model(make_hugging_face("t5-v1.1"))
    ours.generate(**batch(), **FIXED)
    builder, session = forms_of(ours)._builder, weakref.ref(ours.session)
    gc.collect()
    gc.disable()
    try:
        ours.session = None
        assert session() is None
    finally:
        gc.enable()
    builds.may_end.set()
    assert builder is not None
    builder.join(30)
    assert not builder.is_alive()


def test_threads_begin_one_build_of_a_size(builds: Builds) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    ours, got = builds.model(hugging_face), []
    threads = [threading.Thread(target=lambda: got.append(ours.generate(**batch(), **FIXED))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    settle(ours, builds)
    expected = hugging_face.generate(**batch(), **FIXED)
    assert len(got) == 4 and all(torch.equal(each, expected) for each in got)
    asked = ours.session.engines.provider.asked
    assert [graph for graph, _ in asked].count("encoder") <= 2, "a build, and its load"


def test_both_forms_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    slow: Callable[..., Any] = TorchEncoder.run
    made = partial(TorchEncoder, ours.architecture, scaling=Fp16Scaling(), precision="fp32")

    def sleepy(*given: Any) -> torch.Tensor:
        threading.Event().wait(0.05)
        return slow(*given)  # type: ignore[no-any-return]

    monkeypatch.setattr(TorchEncoder, "run", sleepy)
    monkeypatch.setattr(encoder_forms, "ROUNDS", 1)
    ours.session = stand_in_session(ours, monkeypatch, own_encoder=made)
    state = torch.random.get_rng_state()
    ours.generate(**batch(), **FIXED)
    assert torch.equal(torch.random.get_rng_state(), state), "no number of the user's generator is drawn"
    (times,) = ours.session.engines.provider.kept.values()
    assert times["kernels"] > 50 > times["engine"] > 0


def test_unknown_setting_is_named() -> None:
    with pytest.raises(InputError, match=r"building got 'later'; expected one of 'wait', 'background'"):
        TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), building="later")


@pytest.mark.parametrize("precision", ["int8", "tf32"])
def test_precisions_without_kernels_cannot_build_in_the_background(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    class Api:
        version, flavor = "10.0", "tensorrt"

        def check_precision(self, precision: str) -> None: ...

    monkeypatch.setattr(select, "load_tensorrt", lambda flavor: Api())
    monkeypatch.setattr(select, "why_not_tensorrt", lambda *_: None)
    with pytest.raises(InputError, match=f"building got 'background' with precision '{precision}'; .*'wait'"):
        select.choose(RuntimeConfig(backend="tensorrt", precision=precision, building="background"))
