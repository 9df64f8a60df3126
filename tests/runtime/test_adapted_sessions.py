"""Sessions of GPUs write changed weights where kernels and engines read, on stand-ins for both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt.engine.store import EngineStore
from t5_trt.graph.parameters import parameters
from t5_trt.kernels.step_weights import StepWeightsMaker
from t5_trt.modeling import adapter_factors, adapters
from t5_trt.modeling.adapters import AdaptedWeights
from t5_trt.runtime import captured_encoder, cuda_session, kernel_decoder, weight_updates
from t5_trt.runtime.device_weights import DeviceWeights
from tests.adapters import EVERYWHERE, QUIET, compare, logits, lora, peft_pair, tokens
from tests.stand_in_kernels import Recording, TorchSteps
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import make_hugging_face

pytestmark = QUIET
CPU = torch.device("cpu")
CONFIGS = {
    "default": lora(target_modules=EVERYWHERE, modules_to_save=["layer_norm", "final_layer_norm"]),
    "two": lora(use_dora=True),
}


def open_cuda(ours: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> Any:
    """Give a model the session of a GPU, with torch in the kernels' place."""
    monkeypatch.setattr(kernel_decoder, "capture", Recording)
    monkeypatch.setattr(captured_encoder, "capture", Recording)
    monkeypatch.setattr(weight_updates, "capture", Recording)
    monkeypatch.setattr(cuda_session, "KernelDecoder", TorchSteps)
    ours.session  # noqa: B018 - takes note of the weights
    runner = ours._runner
    runner.settings = replace(runner.settings, placement=replace(runner.placement, precision=precision))
    runner._adapted = AdaptedWeights(ours)
    scaling = runner._adapted.fp16_scaling(runner._session_weights.state, lambda: ours.fp16_scaling(precision))
    session: Any = cuda_session.CudaSession(
        ours.architecture, runner._adapted, CPU, precision, scaling, EngineStore(folder)
    )
    session._steps.decoder = session._queries
    ours.session = session
    return session


@pytest.mark.parametrize("kind", ["t5-v1.0", "mt5", "umt5"])
def test_cuda_session_follows_adapters_in_place(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, mine, ours = peft_pair(make_hugging_face(kind), CONFIGS)
    session = open_cuda(ours, tmp_path, monkeypatch, "fp32")
    compare(theirs, mine)
    first = logits(mine)
    for name in ("two", "default"):
        theirs.set_adapter(name), mine.set_adapter(name)
        compare(theirs, mine)
        assert tokens(theirs, "beams") == tokens(mine, "beams")
        assert ours.session is session
    assert torch.equal(logits(mine), first)


def test_switches_between_known_adapters_replay_one_graph_for_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {"default": lora(), "two": lora(), "wide": lora(r=6)}
    theirs, mine, ours = peft_pair(make_hugging_face("t5-v1.1"), configs)
    session = open_cuda(ours, tmp_path, monkeypatch, "fp32")
    captured: list[Any] = []
    computed: list[str] = []
    monkeypatch.setattr(weight_updates, "capture", lambda work, *_, **__: captured.append(work) or Recording(work))
    effective = adapters.effective_weight
    monkeypatch.setattr(adapters, "effective_weight", lambda *args: computed.append(args[0]) or effective(*args))
    first: dict[str, torch.Tensor] = {}
    for name in ("two", "wide", "default", "two", "wide", "default"):
        theirs.set_adapter(name), mine.set_adapter(name)
        compare(theirs, mine)
        computed.clear()
        assert torch.equal(logits(mine), first.setdefault(name, logits(mine))) and not computed
    assert ours.session is session and len(captured) == 2
    with mine.disable_adapter(), theirs.disable_adapter():
        compare(theirs, mine)
    assert len(captured) == 3 and torch.equal(logits(mine), first["default"])
    with torch.no_grad():  # training changes what is kept on the GPU
        for model in (theirs, mine):
            for name, parameter in model.named_parameters():
                if "lora_B.default" in name:
                    parameter.mul_(1.5)
    compare(theirs, mine)
    assert len(captured) == 3 and not torch.equal(logits(mine), first["default"])


def test_factors_at_the_addresses_of_deleted_ones_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of adapters that are deleted before others of their shape are loaded: equal addresses and versions, other values."""
    monkeypatch.setattr(adapter_factors, "low_rank_update", lambda layer: layer)
    layers: dict[str, Any] = {}
    factors = adapter_factors.DeviceFactors(layers)
    for value in range(20):
        layers["q.weight"] = None  # the memory is free
        layers["q.weight"] = [(torch.full((64, 4), float(value)), torch.full((4, 64), float(-value)), 1.0)]
        assert factors.load(CPU) is not None
        ((up, down, _),) = factors["q.weight"]
        assert (up == value).all() and (down == -value).all()


def test_half_precision_is_opened_anew_where_an_adapter_needs_other_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mine, ours = peft_pair(make_hugging_face("t5-v1.1"), {"default": lora(), "two": lora(target_modules=["wo"])})
    session = open_cuda(ours, tmp_path, monkeypatch, "fp16")
    opened: list[Any] = []
    monkeypatch.setattr("t5_trt.modeling.runner.open_session", lambda *args, **options: opened.append(args) or session)
    mine.set_adapter("two")
    assert ours.session is session and not opened
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            if "lora_B.two" in name:
                parameter.mul_(1e6)
    assert ours.session is session and len(opened) == 1


def test_tensorrt_session_follows_adapters_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, mine, ours = peft_pair(make_hugging_face("t5-v1.1"), CONFIGS)
    ours.session  # noqa: B018 - takes note of the weights
    ours._runner._adapted = AdaptedWeights(ours)
    session = ours.session = stand_in_session(ours, monkeypatch)
    compare(theirs, mine)
    asked = len(session.stand_in.asked)
    for name in ("two", "default"):
        theirs.set_adapter(name), mine.set_adapter(name)
        compare(theirs, mine)
    assert ours.session is session and len(session.stand_in.asked) == asked


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "umt5"])
@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.float16, False), (torch.float16, True)])
def test_each_weight_written_in_place_is_what_it_is_made_into(kind: str, dtype: torch.dtype, int8: bool) -> None:
    _, _, ours = peft_pair(make_hugging_face(kind), {"default": lora()})
    scaling, arch = ours.fp16_scaling("fp16"), ours.architecture
    weights = {key: tensor.clone() for key, tensor in AdaptedWeights(ours).items()}
    keys = {key for parameter in parameters(arch).values() for key in (*parameter.parts, parameter.norm) if key}
    maker, device = (
        StepWeightsMaker(arch, weights, dtype, CPU, scaling, int8=int8),
        DeviceWeights(arch, weights, dtype, CPU, scaling),
    )
    step, names = maker.make(), list(parameters(arch))
    for name in names:
        device[name]  # made
    generator = torch.Generator().manual_seed(2)
    for key in sorted(keys):
        if arch.tied_head and key == "shared.weight":
            continue  # an adapted table has another head
        weights[key] = torch.rand(weights[key].shape, generator=generator)
        maker.update(step, key, weights[key])
        device.update(key, weights[key])
    made = StepWeightsMaker(arch, weights, dtype, CPU, scaling, int8=int8).make()
    fresh = DeviceWeights(arch, weights, dtype, CPU, scaling)
    assert all(torch.equal(device[name], fresh[name]) for name in names)
    assert torch.equal(step.embedding, made.embedding) and torch.equal(step.head, made.head)
    for found, wanted in zip(step.layers, made.layers, strict=True):
        for name, value in vars(wanted).items():
            same = (
                torch.equal(getattr(found, name), value)
                if isinstance(value, torch.Tensor)
                else getattr(found, name) == value
            )
            assert same, name
