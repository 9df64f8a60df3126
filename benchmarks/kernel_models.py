"""What the measurements of the decoder's kernels share: the ways to run a model on a GPU, T5-base shapes, files of records."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from t5_trt.errors import BackendError
from t5_trt.tools.environment import environment
from t5_trt.tools.random_models import random_t5
from t5_trt.tools.records import Record, append_records

#: name in records -> arguments of ``from_model``
BACKENDS: dict[str, dict[str, Any]] = {
    "cuda": {"backend": "cuda"},
    "tensorrt-kernels": {"backend": "tensorrt", "decode": "kernels", "check_engines": False},
    "tensorrt-engine": {"backend": "tensorrt", "decode": "engine", "check_engines": False},
}
#: where models and requests live; tests put the CPU here
DEVICE = "cuda"


def available_backends() -> list[str]:
    """Those of `BACKENDS` that can run here."""
    return [name for name in BACKENDS if name == "cuda" or tensorrt_version()]


@cache
def tensorrt_version() -> str | None:
    """Of the TensorRT that is installed."""
    from t5_trt.engine.tensorrt_api import load_tensorrt

    try:
        return load_tensorrt().version
    except BackendError:
        return None


def named_backends(text: str | None) -> list[str]:
    """Backends out of an argument such as "cuda,tensorrt-engine"; None is all that can run here.

    Raises:
        SystemExit: there is no such backend.
    """
    if text is None:
        return available_backends()
    names = text.split(",")
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        sys.exit(f"--backends got {', '.join(unknown)}; expected some of {', '.join(BACKENDS)}")
    return names


def sizes(text: str) -> list[tuple[int, ...]]:
    """Cases out of an argument such as "16x512,1x32"; none of an empty text."""
    return [tuple(map(int, case.split("x"))) for case in text.split(",") if case]


def open_model(name: str, hugging_face: Any, precision: str, store: Path) -> Any:
    """A Hugging Face model on one of `BACKENDS`."""
    from t5_trt import TRTT5ForConditionalGeneration

    return TRTT5ForConditionalGeneration.from_model(
        hugging_face, precision=precision, engine_cache_dir=store, **BACKENDS[name]
    )


def t5_base(layers: int = 12, seed: int = 0) -> Any:
    """T5-base shapes with random weights whose greedy tokens vary, or only the first layers of both stacks."""
    model = random_t5("t5-base", seed)
    for stack in (model.encoder, model.decoder):
        stack.block = stack.block[:layers]
    for config in (model.config, model.encoder.config, model.decoder.config):
        config.num_layers = config.num_decoder_layers = layers
    return model


def base_name(layers: int, seed: int = 0) -> str:
    """How records call `t5_base`."""
    return f"t5-base shapes, random weights, seed {seed}" + ("" if layers == 12 else f", {layers} layers")


@cache
def machine(backend: str = "cuda") -> Record:
    """Versions, GPU and driver."""
    return environment(tensorrt_version() if backend.startswith("tensorrt") else None)


def keep(out: Path, part: str, records: Sequence[Record], backend: str = "cuda") -> None:
    """Add records to a part's file in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    append_records(out / f"{part}.json", [{"part": part, **record, **machine(backend)} for record in records])


def attempt(found: Record, name: str, measure: Callable[[], Any]) -> None:
    """Put what a measurement gives under its name; if it fails, the reason, so that the others are not lost with it."""
    try:
        found[name] = measure()
    except Exception as error:
        found.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:300]
        print(f"{name} failed: {found['failed'][name]}", flush=True)


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with tensors where models live."""
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
