"""The graphs pass a current TensorRT: built for GPUs with TensorRT for RTX on this machine, which has none."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from t5_trt import BackendError, BuildConfig, InputError, TRTT5ForConditionalGeneration
from t5_trt.checkpoint.families import read_architecture
from t5_trt.engine.builder import EngineRequest, build_engine
from t5_trt.engine.profiles import Shapes
from t5_trt.engine.provider import EngineProvider
from t5_trt.engine.store import EngineStore
from t5_trt.engine.tensorrt_api import load_tensorrt
from t5_trt.graph.signature import GRAPHS
from t5_trt.runtime import select
from t5_trt.runtime.open_session import int8_provider_options
from tests.conftest import SHIPPED, pair_of
from tests.rtx_plans import provider
from tests.tiny_models import make_hugging_face


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_shipped_model(tmp_path: Path, precision: str) -> None:
    model = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, num_threads=1)
    plans = provider(model, tmp_path, precision)
    wanted = [(graph, Shapes(B=2, N=4, S=32, T=128, Q=8)) for graph in GRAPHS]
    first = plans.plans(wanted)
    assert all(len(plan) > 10_000 for plan in first)
    assert plans.plans(wanted) == first and len(plans.store.entries()) == len(GRAPHS)
    assert all(plans.has(*want) for want in wanted)


def test_engines_built_ahead_are_found_on_the_gpu(tmp_path: Path) -> None:
    """By a GPU whose capability is among those that were built for, and by no other."""
    model = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, num_threads=1)
    wanted = ("encoder", Shapes(B=1, S=32))
    plan = provider(model, tmp_path, "fp32").plan(*wanted)

    def on(capability: str, precision: str = "fp32") -> EngineProvider:
        gpu = {"name": "a GPU", "compute_capability": capability}
        store, settings = EngineStore(tmp_path), BuildConfig()
        return EngineProvider(model.architecture, store, settings, precision=precision, flavor="rtx", gpu=gpu)

    assert on("8.9").has(*wanted) and on("8.9").plan(*wanted) == plan
    assert not on("7.5").has(*wanted) and not on("8.9", "fp16").has(*wanted)
    assert not on("8.9").has("encoder", Shapes(B=2, S=32))


def test_two_layers_of_t5_base(tmp_path: Path) -> None:
    sizes = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 2, "vocab_size": 4096}
    model = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0", **sizes), num_threads=1)
    plans = provider(model, tmp_path, "fp16")
    for graph in ("encoder", "decoder_step", "decoder_queries"):
        assert 10_000 < len(plans.plan(graph, Shapes(B=1, S=32, T=128, Q=8))) < 20e6  # the weights are not inside


def test_weights_in_8_bits(tmp_path: Path) -> None:
    """Two layers of T5-base with matrices inside, a byte for each weight; other weights are another engine."""
    sizes = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 2, "vocab_size": 4096}
    keys, matrices = set(), 0
    for seed in (0, 1):
        model = TRTT5ForConditionalGeneration.from_model(
            make_hugging_face("t5-v1.1", seed=seed, **sizes), num_threads=1
        )
        options = int8_provider_options(model.architecture, model.state_dict(), model.fp16_scaling("int8"), "int8")
        plans = provider(model, tmp_path, "int8", **options)
        plan = plans.plan("decoder_step", Shapes(B=1, S=32, T=128))
        keys = {entry.key for entry in plans.store.entries()}
        if seed == 0:
            made = options["quantized"]()
            matrices = sum(t.nbytes for n, t in made.items() if n.startswith(("decoder.block", "lm_")))
            assert matrices < len(plan) < 1.3 * matrices
            assert len(plans.plan("encoder", Shapes(B=1, S=32))) > 10e6
    assert len(keys) == 3 and len(plan) > matrices


def test_t5_3b_without_its_weights(tmp_path: Path) -> None:
    """11 GB of weights are no part of the build: it needs neither them nor memory for them."""
    config = T5Config(vocab_size=32128, d_model=1024, d_ff=16384, num_heads=32, d_kv=128, num_layers=24)
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in T5ForConditionalGeneration(config).state_dict().items()}
    arch = read_architecture(config, shapes, tied_head=True, scaled_head=True)
    for graph in ("encoder", "decoder_step"):
        wanted = EngineRequest(
            graph=graph, shapes=Shapes().for_graph(graph), precision="fp16", flavor="rtx", compute_capabilities=("8.9",)
        )
        build_engine(wanted, arch, tmp_path, BuildConfig())
        assert (tmp_path / "engine.plan").stat().st_size < 100e6


def test_dynamic_axes(tmp_path: Path) -> None:
    plans = provider(pair_of("umt5")[1], tmp_path, "fp16")
    assert plans.plan("encoder", Shapes(B=4, S=64, dynamic=("B", "S")))
    assert plans.plan("decoder_step", Shapes(B=4, N=2, S=64, T=256, dynamic=("B", "S", "T")))


def request(capability: str = "8.9", precision: str = "fp32") -> EngineRequest:
    shapes = Shapes(B=1, S=32).for_graph("encoder")
    return EngineRequest(
        graph="encoder", shapes=shapes, precision=precision, flavor="rtx", compute_capabilities=(capability,)
    )


def test_unknown_compute_capability(tmp_path: Path) -> None:
    _, ours = pair_of("t5-v1.0")
    with pytest.raises(InputError, match=r"compute capability got '9\.0'.*builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"):
        build_engine(request("9.0"), ours.architecture, tmp_path, BuildConfig())


def test_build_error_contains_tensorrts_message(tmp_path: Path) -> None:
    _, ours = pair_of("t5-v1.0")
    with pytest.raises(BackendError, match=r"building encoder B1 S32 fp32: .*could not build"):
        build_engine(request(), ours.architecture, tmp_path, BuildConfig(workspace_bytes=1))


def test_stopped_build_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the build process works: it is gone afterwards, and so is its folder."""
    from t5_trt.engine import builder

    _, ours = pair_of("t5-v1.0")
    seen: list[int] = []

    class Spy(builder.subprocess.Popen):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen.append(self.pid)

    def interrupt(line: str, progress: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(builder.subprocess, "Popen", Spy)
    monkeypatch.setattr(builder, "_handle", interrupt)
    store = EngineStore(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        store.get_or_build("k", {}, lambda folder: build_engine(request(), ours.architecture, folder, BuildConfig()))
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)
    assert not [entry for entry in store.root.iterdir() if entry.name.startswith(".building")]


def test_builds_run_side_by_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plans = provider(pair_of("t5-v1.0")[1], tmp_path, "fp32")
    before = threading.active_count()
    with caplog.at_level(logging.INFO, "t5_trt"):
        plans.plans([("encoder", Shapes()), ("cross", Shapes())])
    order = [record.message.split(" engine ")[0] for record in caplog.records if " the engine " in record.message]
    assert order == ["building the", "building the", "built the", "built the"]
    time.sleep(0.05)
    assert threading.active_count() == before


def test_flavors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_tensorrt("rtx").strongly_typed
    monkeypatch.setenv("T5_TRT_FLAVOR", "rtx")
    assert load_tensorrt().flavor == "rtx"
    with pytest.raises(InputError, match="flavor got 'lite'; expected one of 'tensorrt', 'rtx'"):
        load_tensorrt("lite")
    with pytest.raises(BackendError, match=r'pip install "t5-trt\[cu13\]"'):
        load_tensorrt("tensorrt")


def test_tensorrt_without_a_gpu() -> None:
    with pytest.raises(BackendError, match=r"backend='tensorrt' cannot run here: there is no NVIDIA GPU"):
        TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), backend="tensorrt", flavor="rtx")
    with pytest.raises(BackendError, match=r"backend='tensorrt' cannot run here: TensorRT is not usable here"):
        TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), backend="tensorrt", flavor="tensorrt")


def test_gpu_that_rtx_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    # with them, "auto" would choose backend="cuda"
    monkeypatch.setattr(select, "missing_bindings", lambda: "cuda-bindings are missing")
    with pytest.raises(
        BackendError, match=r'this GPU has 9.0. Install TensorRT instead with `pip install "t5-trt\[cu13\]"`'
    ):
        TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), backend="tensorrt", flavor="rtx")
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), flavor="rtx", num_threads=1)
    assert ours.session.backend == "onnxruntime"
