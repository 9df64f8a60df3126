"""TensorRT beside the kernels, on stand-ins: engines encode, and decode where tokens of the decoder are hidden; kernels do the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from t5_trt.config import BuildConfig, RuntimeConfig
from t5_trt.engine.store import EngineStore
from t5_trt.graph.parameters import EMBEDDING, LM_HEAD, parameters
from t5_trt.kernels.step_weights import StepWeightsMaker
from t5_trt.runtime import captured_encoder, cuda_graph, cuda_session, kernel_decoder, weight_updates
from t5_trt.runtime import open_session as opening
from t5_trt.runtime.kernel_decoder import KernelDecoder
from t5_trt.runtime.select import Placement
from t5_trt.runtime.torch_layers import TorchDecoder
from tests.stand_in_kernels import Recording, TorchSteps, kernels_pair
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import KINDS, batch, large_logits, make_hugging_face, swollen
from tests.tolerances import LOGITS_ATOL

HALF_RELATIVE = 0.02
#: what an engine decodes
HIDING = {
    "decoder_input_ids": torch.tensor([[0, 5, 6]] * 3),
    "decoder_attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1]]),
}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """(Hugging Face model, ours with a TrtSession on the stand-in whose steps torch does in the kernels' place)."""
    monkeypatch.setattr(kernel_decoder, "capture", Recording)
    monkeypatch.setattr(captured_encoder, "capture", Recording)
    monkeypatch.setattr(weight_updates, "capture", Recording)

    def of(hugging_face: Any, precision: str = "fp32", **options: Any) -> tuple[Any, Any]:
        ours = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)
        dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
        arch, scaling, cpu = ours.architecture, ours.fp16_scaling(precision), torch.device("cpu")
        maker = StepWeightsMaker(arch, ours.state_dict(), dtype, cpu, scaling)
        steps = TorchSteps(maker, precision, EngineStore(tmp_path))
        steps.decoder = TorchDecoder(arch, steps.weights, scaling, precision)
        ours.session  # noqa: B018 - takes note of the weights
        ours.session = stand_in_session(
            ours, monkeypatch, precision=precision, scaling=scaling, kernels=steps, **options
        )
        return hugging_face, ours

    return of


def asked(ours: Any) -> list[str]:
    """Graphs that engines were asked for, in order."""
    return [graph for graph, _ in ours.session.stand_in.asked]


@pytest.mark.parametrize("kind", list(KINDS))
def test_greedy_and_beams_build_an_encoder_only(make: Any, kind: str) -> None:
    hugging_face, ours = make(make_hugging_face(kind))
    for rows in (3, 1):  # engines have 4 rows, kernels as many as there are
        for arguments in ({}, {"num_beams": 3}):
            request = {**batch(rows), "max_new_tokens": 20, **arguments}
            assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()
            assert ours.last_generation_path.loop == "device"
    assert asked(ours) == ["encoder", "encoder"]
    assert ours.session.loaded_graphs() == ("encoder", "decoder step (kernels)") and ours.session.steps_by == "kernels"


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -1.0},
        {"do_sample": True, "num_return_sequences": 2},
        {"decoder_input_ids": torch.tensor([[0, 5, 6, 7]] * 3)},
        {"decoder_input_ids": torch.tensor([[0, 5, 6, 7]] * 3), "num_beams": 2},
        {"decoder_input_ids": torch.tensor([[0, *range(2, 142)]] * 3), "max_new_tokens": 130, "min_new_tokens": 130},
        {"max_new_tokens": 150, "min_new_tokens": 150},
        {"use_cache": False},
    ],
    ids=["beams, several", "sampling", "prompt", "prompt, beams", "long prompt", "growing cache", "no cache"],
)
def test_requests_equal_hugging_face(make: Any, arguments: dict[str, Any]) -> None:
    hugging_face, ours = make(make_hugging_face("t5-v1.1"))
    for seed in (3, 4):  # the second request uses the buffers of the first
        results = []
        for model in (hugging_face, ours):
            torch.manual_seed(seed)
            results.append(model.generate(**{**batch(seed=seed), "max_new_tokens": 12, **arguments}).tolist())
        assert results[0] == results[1]
    assert set(asked(ours)) == {"encoder"}


def test_assisted_generation_takes_tokens_back(make: Any) -> None:
    hugging_face, ours = make(make_hugging_face("t5-v1.1"))
    other = make_hugging_face("t5-v1.1", seed=3)
    request = {**batch(1), "max_new_tokens": 20, "min_new_tokens": 20}
    expected = hugging_face.generate(**request).tolist()
    assert ours.generate(**request, prompt_lookup_num_tokens=3).tolist() == expected
    assert ours.generate(**request, assistant_model=other).tolist() == expected
    assert set(asked(ours)) == {"encoder"}


def test_steps_and_several_positions_in_turns(make: Any) -> None:
    """Forward calls over one cache, with masks of the decoder's own tokens and a mask of the source that changes."""
    hugging_face, ours = make(make_hugging_face("t5-v1.1"))
    mask = batch()["attention_mask"].clone()
    own = torch.ones((3, 9), dtype=torch.long)
    own[1, :2] = 0
    ids = torch.randint(2, 200, (3, 9), generator=torch.Generator().manual_seed(4))
    results = []
    for model in (hugging_face, ours):
        kept, cache = [], None
        with torch.no_grad():
            states = (model.get_encoder()(**batch()).last_hidden_state,)
            for start, end in ((0, 1), (1, 4), (4, 5), (5, 6), (6, 9)):
                changed = mask.clone()
                changed[0, 5] = int(start < 4)
                masked = {"decoder_attention_mask": own[:, :end]} if start == 5 else {}
                out = model(
                    encoder_outputs=states,
                    attention_mask=changed,
                    decoder_input_ids=ids[:, start:end],
                    **masked,
                    **{CACHE: cache},
                )
                cache = out[CACHE]
                kept.append(out.logits)
            cache.batch_select_indices(torch.tensor([2, 0]))
            states = (states[0][[2, 0]],)
            for count in (1, 2):
                fed = {"decoder_input_ids": ids[:2, :count], "attention_mask": mask[[2, 0]]}
                kept.append(model(encoder_outputs=states, **fed, **{CACHE: cache}).logits)
        results.append(torch.cat([logits.flatten() for logits in kept]))
    torch.testing.assert_close(results[1], results[0], atol=LOGITS_ATOL, rtol=1e-5)


@pytest.mark.parametrize("enlarge", [lambda s: swollen(s, 30.0, 1e3), lambda s: large_logits(s, 2.0**18)])
def test_half_precision_of_overflowing_checkpoints(make: Any, enlarge: Any) -> None:
    """Keys and values go from the kernels to an engine and back in the scale that both know."""
    hugging_face, ours = make(enlarge(make_hugging_face("t5-v1.1")), "fp16")
    ids = torch.tensor([[0, 9, 8, 7, 6, 5, 4]] * 3)
    with torch.no_grad():
        expected = hugging_face(**batch(), decoder_input_ids=ids).logits
        got, cache = [], None
        for start, end in ((0, 1), (1, 2), (2, 4), (4, 5), (5, 7)):
            if start == 2:  # as where tokens are hidden
                state, shown = cache.state, torch.ones((3, end), dtype=torch.long)
                got.append(ours.session.decode(state, ids[:, start:end], shown))
                continue
            out = ours(**batch(), decoder_input_ids=ids[:, start:end], **{CACHE: cache})
            got.append(out.logits)
            cache = out[CACHE]
    assert "decoder_queries" in asked(ours)
    logits = torch.cat(got, 1)
    assert logits.isfinite().all() and float((logits - expected).norm() / expected.norm()) < HALF_RELATIVE


def test_decoder_weights_are_there_once(make: Any) -> None:
    """Engines get theirs when one is used that reads them; the embedding is the same memory."""
    _, ours = make(make_hugging_face("t5-v1.1"))
    weights, steps = ours.session.engines.weights, ours.session._steps
    ours.generate(**batch(), max_new_tokens=4)
    own = {name for name in parameters(ours.architecture) if name.startswith("decoder.block")} | {LM_HEAD}
    assert len(own) > 8 and not own & weights._made.keys() and weights[EMBEDDING] is steps.embedding
    before, packed = ours.session.weight_bytes, steps.weight_bytes
    assert before == weights.nbytes + packed and packed > 0
    ours.generate(**batch(), decoder_input_ids=torch.tensor([[0, 4, 5]] * 3), max_new_tokens=4)
    assert ours.session.weight_bytes == before
    with torch.no_grad():
        ours(**batch(), **HIDING)
    assert ours.session.weight_bytes > before and own < weights._made.keys()


def test_new_engines_are_checked(make: Any) -> None:
    """Encoder and decoder with hidden tokens; the state that is being decoded stays what it is meanwhile."""
    hugging_face = make_hugging_face("t5-v1.1")
    reference = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1).session
    _, ours = make(hugging_face, reference=reference)
    engines, errors = ours.session.engines, {}
    measure = engines._check
    engines._check = lambda graph, shapes: errors.setdefault(graph, measure(graph, shapes))
    with torch.no_grad():
        results = [model(**batch(), **HIDING).logits for model in (ours, hugging_face)]
    shown = HIDING["decoder_attention_mask"].bool()
    torch.testing.assert_close(results[0][shown], results[1][shown], atol=LOGITS_ATOL, rtol=1e-5)
    assert set(errors) == {"encoder", "decoder_queries"} and all(0 <= found.error < 1e-4 for found in errors.values())


def test_memory_that_runs_out(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle buffers of both kinds are given back, and the next request works."""
    from t5_trt import BackendError

    hugging_face, ours = make(make_hugging_face("t5-v1.1"))
    prompt = {"decoder_input_ids": torch.tensor([[0, 5, 6]] * 3), "max_new_tokens": 5}
    expected = hugging_face.generate(**batch(), **prompt).tolist()
    assert ours.generate(**batch(), **prompt).tolist() == expected
    session = ours.session
    monkeypatch.setattr(cuda_graph, "free_unused", lambda: None)
    with monkeypatch.context() as patch:

        def full(*_: Any) -> Any:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        patch.setattr(session._steps, "_allocate", full)
        with pytest.raises(BackendError, match="GPU memory ran out"):
            ours.generate(**batch(5), max_new_tokens=3)
    assert not session._slots.idle and not session._steps._idle
    assert ours.generate(**batch(), **prompt).tolist() == expected


def test_cache_that_outlives_its_engines(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights change between two steps: the next one reads new weights, over the keys and values that are there."""
    hugging_face, ours = make(make_hugging_face("t5-v1.1"))
    results = []
    for model in (hugging_face, ours):
        with torch.no_grad():
            out = model(**batch(), decoder_input_ids=torch.zeros(3, 1, dtype=torch.long))
            for parameter in model.decoder.block[1].layer[2].parameters():
                parameter.mul_(0.5)
        if model is ours:
            _, again = make(hugging_face)
            ours.session, ours._runner._session_weights = again.session, None
        with torch.no_grad():
            fed = {"decoder_input_ids": torch.tensor([[7], [8], [9]]), "attention_mask": batch()["attention_mask"]}
            results.append(model(encoder_outputs=(out.encoder_last_hidden_state,), **fed, **{CACHE: out[CACHE]}).logits)
    torch.testing.assert_close(results[1], results[0], atol=LOGITS_ATOL, rtol=1e-5)


@pytest.mark.parametrize("decode", ["kernels", "engine"])
def test_session_that_opens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, decode: str) -> None:
    """With packed weights where kernels decode, and without where an engine does."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(opening, "gpu_facts", lambda device: {})
    monkeypatch.setattr(opening, "load_tensorrt", lambda flavor: None)
    monkeypatch.setattr(opening, "EngineProvider", lambda *args, **kwargs: None)
    monkeypatch.setattr(opening, "TrtSession", lambda *args, **kwargs: given.update(kwargs) or "session")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"))
    cpu = torch.device("cpu")
    placement = Placement("tensorrt", "fp32", cpu, torch.float32, "tensorrt", "", decode=decode)
    config = RuntimeConfig(engine_cache_dir=tmp_path)
    arch, weights = ours.architecture, ours.state_dict()
    seen: Any = None
    opening.open_session(arch, weights, config, placement, BuildConfig(), seen)
    assert isinstance(given["kernels"], KernelDecoder) == (decode == "kernels")


def test_calls_of_many_tokens_are_left_to_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, ours = kernels_pair(monkeypatch, tmp_path)
    given = batch() | {"decoder_input_ids": torch.randint(3, 200, (3, 8))}
    by_kernels = ours(**given).logits
    monkeypatch.setattr(cuda_session, "KERNEL_TOKENS", 23)
    monkeypatch.setattr(ours.session._steps, "decode", lambda *_: pytest.fail("the kernels decode"))
    torch.testing.assert_close(ours(**given).logits, by_kernels)
