"""A GPU that cannot be used is said, with the command that brings what is missing; simulated, as no GPU is here."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from t5_trt import (
    BackendError,
    InputError,
    TRTT5EncoderModel,
    TRTT5ForConditionalGeneration,
    UnsupportedModelError,
    installation,
)
from t5_trt.cli import app
from t5_trt.engine import tensorrt_api
from t5_trt.runtime import select
from tests.conftest import SHIPPED
from tests.tiny_models import batch, make_hugging_face

TENSORRT = r'`pip install "t5-trt\[cu13\]"`'


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and "GPU" in record.getMessage()
    ]


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was said or looked up yet, and no TensorRT is installed."""
    select._log_once.cache_clear()
    installation.gpu_is_here.cache_clear()
    monkeypatch.setattr(tensorrt_api, "_LOADED", {})
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("T5_TRT_BACKEND", "T5_TRT_FLAVOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    yield
    select._log_once.cache_clear()
    installation.gpu_is_here.cache_clear()  # other tests are on the machine that is here


@pytest.fixture
def gpu(fresh_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch sees a GPU; what the kernels need is not installed either."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(
        select, "missing_bindings", lambda: "the CUDA kernels need the package cuda-bindings (not here)"
    )


@pytest.mark.parametrize(("built_for", "extra"), [("12.6", "cu12"), ("13.0", "cu13")])
def test_missing_tensorrt_is_logged_once(
    gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, built_for: str, extra: str
) -> None:
    """With the extras for the CUDA of the installed PyTorch; the model runs, on the CPU."""
    monkeypatch.setattr(torch.version, "cuda", built_for)
    ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, num_threads=1)
    TRTT5EncoderModel.from_pretrained(SHIPPED, num_threads=1)
    (message,) = warnings_of(caplog)
    assert message.startswith("models run on the CPU and the GPU is idle: TensorRT is not usable here")
    assert f'`pip install "t5-trt[{extra}]"`' in message and f'`pip install "t5-trt[rtx-{extra}]"`' in message
    assert f'`pip install "t5-trt[kernels-{extra}]"`' in message
    assert ".." not in message
    assert ours.generate(torch.tensor([[5, 6, 1]]), max_new_tokens=3).device.type == "cpu"


@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_device_map_that_leaves_the_choice(gpu: None, caplog: pytest.LogCaptureFixture, device_map: str) -> None:
    TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, device_map=device_map)
    assert len(warnings_of(caplog)) == 1


def test_model_from_memory(gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"))
    assert len(warnings_of(caplog)) == 1


def test_model_from_a_config(gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    """It is placed when it first runs."""
    ours = TRTT5ForConditionalGeneration(make_hugging_face("t5-v1.0").config)
    ours(**batch(), decoder_input_ids=torch.zeros((3, 1), dtype=torch.long))
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("options", [{"backend": "onnxruntime"}, {"device": "cpu"}, {"device_map": "cpu"}])
def test_cpu_that_was_asked_for(gpu: None, caplog: pytest.LogCaptureFixture, options: dict[str, str]) -> None:
    TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, **options)
    assert not warnings_of(caplog)


def test_cpu_that_the_environment_asks_for(
    gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("T5_TRT_BACKEND", "onnxruntime")
    TRTT5ForConditionalGeneration.from_pretrained(SHIPPED)
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cuda"},
        {"device": "cuda:0"},
        {"device": torch.device("cuda", 0)},
        {"device_map": "cuda"},
        {"device_map": {"": "cuda:0"}},
        {"backend": "tensorrt"},
        {"precision": "fp16"},
    ],
)
def test_gpu_that_was_asked_for(gpu: None, options: dict[str, Any]) -> None:
    with pytest.raises((BackendError, InputError), match=TENSORRT):
        TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, **options)


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_moves_to_the_gpu(gpu: None, backend: str) -> None:
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), backend=backend)
    for move in (lambda: ours.to("cuda"), ours.cuda, lambda: ours.to(torch.device("cuda", 0), torch.float16)):
        with pytest.raises(BackendError, match=f"runs on cpu .*{TENSORRT}.*from_pretrained"):
            move()


def test_rtx_on_a_gpu_that_it_does_not_run_on(
    monkeypatch: pytest.MonkeyPatch, gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"))
    (message,) = warnings_of(caplog)
    assert 'this GPU has 9.0. Install TensorRT instead with `pip install "t5-trt[cu13]"`' in message


@pytest.fixture
def kernels(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels need is there, TensorRT is not."""
    monkeypatch.setattr(select, "missing_bindings", lambda: None)


def messages_about_tensorrt(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if "TensorRT" in record.getMessage()]


def test_gpu_is_used_without_tensorrt(kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is idle, so nothing is warned of; what TensorRT would do is said once, for who looks."""
    with caplog.at_level(logging.INFO, "t5_trt"):
        for _ in range(2):
            ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED)
    assert ours.device == torch.device("cuda:0") and "backend=cuda, precision=fp16, decode=kernels" in repr(ours)
    ((level, message),) = messages_about_tensorrt(caplog)
    assert level == "INFO" and "models run on the GPU without TensorRT, by our own kernels and PyTorch" in message


@pytest.mark.parametrize(
    ("options", "device", "precision"),
    [
        ({"device": "cuda"}, "cuda:0", "fp16"),
        ({"device_map": {"": "cuda:1"}}, "cuda:1", "fp16"),
        ({"precision": "fp32"}, "cuda:0", "fp32"),
        ({"dtype": torch.bfloat16}, "cuda:0", "bf16"),
        ({"decode": "kernels"}, "cuda:0", "fp16"),
        ({"device": "cpu"}, "cpu", "fp32"),
        ({"backend": "onnxruntime"}, "cpu", "fp32"),
    ],
)
def test_where_models_run_without_tensorrt(
    kernels: None, caplog: pytest.LogCaptureFixture, options: dict[str, Any], device: str, precision: str
) -> None:
    for cls in (TRTT5ForConditionalGeneration, TRTT5EncoderModel):
        ours = cls.from_pretrained(SHIPPED, **options)
        assert ours.device == torch.device(device) and f"precision={precision}" in repr(ours)
    assert not warnings_of(caplog)


def test_setting_that_leaves_the_gpu_idle_without_tensorrt(kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, decode="engine")
    (message,) = warnings_of(caplog)
    assert ours.device.type == "cpu" and "the backend 'cuda' has no engines" in message and "pip install" in message


def test_model_that_the_kernels_do_not_take(
    kernels: None, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It falls to the CPU with the reason, also from a folder, in bfloat16 and from a config; asking for the GPU is an error."""
    monkeypatch.setattr(select, "why_not_compiled", lambda: None)
    hugging_face = make_hugging_face("t5-v1.1", d_kv=20)  # no multiple of 8; of 4, so that float32 would do
    hugging_face.to(torch.bfloat16).save_pretrained(tmp_path)
    for make in (
        lambda **options: TRTT5ForConditionalGeneration.from_model(hugging_face, **options),
        lambda **options: TRTT5ForConditionalGeneration.from_pretrained(tmp_path, **options),
    ):
        ours = make()
        assert ours.device.type == "cpu" and "backend=onnxruntime, precision=fp32" in repr(ours)
        with pytest.raises(UnsupportedModelError, match=r"backend='cuda' cannot run here.*d_kv is 20.*'onnxruntime'"):
            make(backend="cuda")
        assert "decode=kernels" in repr(make(decode="kernels")) and make(decode="kernels").device.type == "cpu"
        assert make(precision="fp32").device.type == "cuda"
    assert TRTT5ForConditionalGeneration(hugging_face.config).device.type == "cpu"
    (message,) = warnings_of(caplog)
    assert "the kernels do not take this model: d_kv is 20" in message and "the GPU is idle" in message
    assert TRTT5EncoderModel.from_pretrained(tmp_path).device.type == "cuda"  # it has no steps


def test_older_gpu_stays_idle(kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    TRTT5ForConditionalGeneration.from_pretrained(SHIPPED)
    (message,) = warnings_of(caplog)
    assert "the kernels need compute capability 8.0; this GPU has 7.5" in message


def test_amd_gpu_is_not_taken(kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch for ROCm calls it CUDA."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED)
    assert ours.device.type == "cpu" and not warnings_of(caplog)
    with pytest.raises(BackendError, match="is built for ROCm"):
        TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, backend="cuda")


def test_tensorrt_that_was_asked_for_stays_an_error(kernels: None) -> None:
    with pytest.raises(BackendError, match=TENSORRT):
        TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, backend="tensorrt")


def test_move_to_the_gpu_that_kernels_could_use(kernels: None) -> None:
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), backend="onnxruntime")
    with pytest.raises(
        BackendError, match=r"runs on cpu with the backend 'onnxruntime'\. Choose the device when loading"
    ):
        ours.to("cuda")


def test_info_tells_who_decodes(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA L4", major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    facts = json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout)
    chosen = facts["chosen"]
    assert (chosen["backend"], chosen["decode"], chosen["device"]) == ("cuda", "kernels", "cuda:0")
    assert facts["why_no_kernels"] is None and facts["idle_gpu"] is None
    shown = " ".join(CliRunner().invoke(app, ["info"]).stdout.split())
    assert (
        "decoder steps by │ our CUDA kernels" in shown
        and "the library's own kernels can run, and TensorRT cannot" in shown
    )


@pytest.fixture
def gpu_without_pytorch(fresh_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine whose nvidia-smi lists a GPU that PyTorch cannot use; returns that command."""
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L4 (UUID: GPU-1)'\n")
    command.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return command


def test_pytorch_without_cuda(
    gpu_without_pytorch: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED)
    (message,) = warnings_of(caplog)
    assert "is built without CUDA. Install the build with CUDA with `pip install --force-reinstall torch`" in message
    with pytest.raises(BackendError, match="is built without CUDA"):
        ours.to("cuda")
    with pytest.raises(InputError, match="is built without CUDA"):
        TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, device="cuda")


def test_driver_that_pytorch_cannot_use(
    gpu_without_pytorch: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the driver's own words."""

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nUpdate it.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    TRTT5ForConditionalGeneration.from_pretrained(SHIPPED)
    (message,) = warnings_of(caplog)
    assert (
        "is built for CUDA 13.0, cannot use it: The NVIDIA driver on your system is too old (found version 12040)."
        in message
    )
    assert "`nvidia-smi`" in message and "--gpus all" in message


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda command, env: None, True),
        (lambda command, env: command.write_text("#!/bin/sh\necho 'couldn'\\''t communicate'\nexit 9\n"), False),
        (lambda command, env: command.write_text("#!/no/such/program\n"), False),
        (lambda command, env: command.unlink(), False),
        (lambda command, env: env("CUDA_VISIBLE_DEVICES", ""), False),
        (lambda command, env: env("CUDA_VISIBLE_DEVICES", "-1"), False),
        (lambda command, env: env("CUDA_VISIBLE_DEVICES", "0"), True),
    ],
)
@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_what_counts_as_a_gpu(
    gpu_without_pytorch: Path, monkeypatch: pytest.MonkeyPatch, change: Any, seen: bool
) -> None:
    change(gpu_without_pytorch, monkeypatch.setenv)
    assert installation.gpu_is_here() is seen


def test_machine_without_a_gpu_is_quiet(fresh_process: None, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(select, "gpu_is_here", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    TRTT5ForConditionalGeneration.from_pretrained(SHIPPED)
    assert not warnings_of(caplog)


def test_info_says_it_first(gpu_without_pytorch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    shown = CliRunner().invoke(app, ["info"])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("models run on the CPU and the GPU is idle: there is an NVIDIA GPU, but PyTorch")
    assert "is built without CUDA" in shown.stdout.splitlines()[0]
