"""The user's settings and their defaults: arguments first, then ``T5_TRT_*`` variables, then built-in values.

This module checks only names and ranges; `t5_trt.runtime.select` checks whether a backend can run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from t5_trt.errors import InputError

BACKENDS = ("auto", "tensorrt", "cuda", "onnxruntime")
ENGINE_PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
PRECISIONS = ("auto", *ENGINE_PRECISIONS, "int4")
DECODE = ("auto", "kernels", "engine")
BUILDING = ("wait", "background")


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        InputError: it is not; the message names the value and the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{what} got {value!r}; expected one of {', '.join(map(repr, choices))}.")
    return value


def default_engine_cache_dir() -> Path:
    """The folder of built engines: ``T5_TRT_CACHE``, else the user's cache folder."""
    configured = os.environ.get("T5_TRT_CACHE")
    return Path(configured).expanduser() if configured else Path(platformdirs.user_cache_dir("t5_trt", False))


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Settings that change how a model runs, but not the contents of its engines.

    Attributes:
        backend: "auto" (TensorRT if it and a GPU are available, else "cuda" with a GPU, else ONNX Runtime on the CPU), "tensorrt",
            "cuda" (our own kernels and torch on a GPU, without TensorRT) or "onnxruntime". Default: ``T5_TRT_BACKEND``, else "auto".
        precision: "auto", "fp32", "tf32", "fp16", "bf16", "int8" or "int4". A CPU runs "fp32", "bf16" (the decoder's matrices in bfloat16,
            by the C code, and all else in float32), "int8" and "int4" (the decoder's matrices in 4 bits, the others in 8, by ONNX
            Runtime). On GPUs "int8" is for the decoder's matrices, and "fp16" for the rest.
        decode: what runs the decoder: "kernels" (the library's CUDA kernels, or on a CPU its C code, which the system's C compiler
            compiles), "engine" (the backend's) or "auto" (kernels if they can run, else the engine). The backend "cuda" has kernels
            only; "int4" has an engine only, "bf16" on a CPU kernels only.
        device: a torch device string such as "cuda:0" or "cpu"; None lets the backend choose.
        strict: raise `StrictModeError` instead of using the Hugging Face model for requests that engines cannot serve.
        num_threads: CPU threads of ONNX Runtime and of the C code; None takes ``torch.get_num_threads()``.
        thread_spinning: let those threads wait actively inside a step. False lets other processes have the processor meanwhile: slower
            alone, faster where there are more busy threads than cores.
        prepack_weights: let ONNX Runtime copy the matrices into its own layout, which is up to twice as fast with 2 or more
            rows (beams, batches) and needs memory for a second copy. None does so for decoder steps of several rows, at
            the first one; True for everything; False for nothing.
        max_source_tokens: longer sources are refused; None sets no limit (T5 itself has none).
        max_target_tokens: longer outputs are refused; None sets no limit.
        engine_cache_dir: folder of built engines. Default: ``T5_TRT_CACHE``, else the user's cache folder.
        engine_cache_bytes: above this size the least recently used engines are removed; None keeps all.
        flavor: "tensorrt" or "rtx"; None takes ``T5_TRT_FLAVOR``, else the one that is installed.
        show_progress: draw a bar while engines are built; None does so on a terminal only.
        building: what a request does if TensorRT must first build its encoder engine: "wait" for it, or "background": encode as the backend
            "cuda" does until the engine is built, and then use the engine if it is faster. Other backends build no engines.
        check_engines: compare every engine that is built with ONNX Runtime once, on random inputs, before it is used.
        bundled_engines: folder of trusted engines stored with the checkpoint.
    """

    backend: str = "auto"
    precision: str = "auto"
    decode: str = "auto"
    device: str | None = None
    strict: bool = False
    num_threads: int | None = None
    thread_spinning: bool = True
    prepack_weights: bool | None = None
    max_source_tokens: int | None = None
    max_target_tokens: int | None = None
    engine_cache_dir: Path | None = None
    engine_cache_bytes: int | None = None
    flavor: str | None = None
    show_progress: bool | None = None
    building: str = "wait"
    check_engines: bool = True
    bundled_engines: Path | None = None

    def __post_init__(self) -> None:
        if self.engine_cache_dir is not None:
            object.__setattr__(self, "engine_cache_dir", Path(self.engine_cache_dir).expanduser())
        check_choice("backend", self.backend, BACKENDS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("decode", self.decode, DECODE)
        check_choice("building", self.building, BUILDING)
        for name in ("num_threads", "max_source_tokens", "max_target_tokens", "engine_cache_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} got {value!r}; expected an integer of at least 1, or None for the default.")

    @property
    def cache_dir(self) -> Path:
        """The folder of built engines: the setting, else the default."""
        return self.engine_cache_dir or default_engine_cache_dir()


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Settings that change the bytes of an engine; they are part of its cache key.

    Attributes:
        max_batch: largest batch B of one engine; larger requests raise with ``strict=True``, else an engine is built for them.
        max_beams: largest number of beams N.
        max_source_tokens: largest source bucket S.
        max_target_tokens: largest cache bucket T.
        dynamic: axes out of "B", "N", "S", "T", "Q" that an engine takes at any size up to its bucket instead of only
            at it. Fixed axes build several times faster and pad requests.
        workspace_bytes: largest scratch memory of an engine.
        optimization_level: 0 (quick build) to 5 (slow build); None is TensorRT's default. TensorRT 8.6 and newer.
    """

    max_batch: int = 32
    max_beams: int = 16
    max_source_tokens: int = 512
    max_target_tokens: int = 512
    dynamic: tuple[str, ...] = ()
    workspace_bytes: int = 4 << 30
    optimization_level: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_beams", "max_source_tokens", "max_target_tokens", "workspace_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} got {value!r}; expected an integer of at least 1.")
        level = self.optimization_level
        if level is not None and level not in range(6):
            raise InputError(f"optimization_level got {level!r}; expected 0 to 5, or None for TensorRT's default.")


def backend_from_environment(argument: str | None) -> str:
    """The backend to use: the argument unless it is None or "auto", else ``T5_TRT_BACKEND``, else "auto".

    Raises:
        InputError: the argument or the variable names no backend.
    """
    if argument is not None and argument != "auto":
        return check_choice("backend", argument, BACKENDS)
    return check_choice("the environment variable T5_TRT_BACKEND", os.environ.get("T5_TRT_BACKEND") or "auto", BACKENDS)
