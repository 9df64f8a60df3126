"""CUDA C++ compiled by NVRTC for the GPU at hand: no compiler is needed on the user's machine, and cubins are kept on disk."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from t5_trt.engine.store import PLAN, EngineStore
from t5_trt.errors import BackendError

logger = logging.getLogger("t5_trt")

#: lowest supported compute capability: the kernels need asynchronous copies and bfloat16 tensor cores
LEAST_CAPABILITY = (8, 0)
NOT_KEPT = "compiled kernels are not kept for the next process: %s"


def read_sources(name: str) -> dict[str, bytes]:
    """A source file of this package and every header that it may include, by file name, the source first.

    Args:
        name: path of the source, such as "decode_step.cu" or "cpu/decode_step.c"; headers are those of its folder.
    """
    *path, source = name.split("/")
    folder = files("t5_trt.kernels").joinpath(*path)
    headers = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith((".cuh", ".h")))
    return {entry: (folder / entry).read_bytes() for entry in (source, *headers)}


def sources_digest(name: str) -> str:
    """The digest of all that `read_sources` reads."""
    return hashlib.sha256(b"\0".join(read_sources(name).values())).hexdigest()


def store_key(facts: Mapping[str, Any]) -> str:
    """The key of compiled code in a store: a digest of all that it depends on."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:32]


def architecture_name(major: int, minor: int) -> str:
    """What the compiler calls a GPU's architecture: with the instructions that only this one has, where kernels use them.

    Args:
        major: of its compute capability.
        minor: likewise.
    """
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def compile_cubin(name: str, constants: Mapping[str, int], architecture: str) -> tuple[bytes, str]:
    """Compile a source of this package.

    Args:
        name: of the file, such as "decode_step.cu".
        constants: passed as ``-DNAME=VALUE``.
        architecture: such as "sm_90".

    Returns:
        The cubin, and the log with each kernel's registers and spills.

    Raises:
        BackendError: NVRTC is missing or refuses the source.
    """
    nvrtc = bindings("nvrtc")
    source, *headers = read_sources(name).items()
    texts, names = [text for _, text in headers], [header.encode() for header, _ in headers]
    program = checked(nvrtc.nvrtcCreateProgram(source[1], name.encode(), len(headers), texts, names))
    flags = _flags(constants, architecture)
    status = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])[0]
    log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode(errors="replace").strip("\0 \n")
    if int(status):
        raise BackendError(f"NVRTC cannot compile {name} for {architecture} with {dict(constants)}: {text or status}")
    cubin = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin, text


def stored_cubin(name: str, constants: Mapping[str, int], architecture: str, store: EngineStore) -> bytes:
    """`compile_cubin`, kept in a store: another process with the same sources, constants, GPU and NVRTC compiles nothing.

    If the store cannot be written, kernels are compiled by every process, with a warning.
    """
    version = ".".join(map(str, checked(bindings("nvrtc").nvrtcVersion(), 2)))
    flags = _flags(constants, architecture)
    facts = {"kernels": name, "flags": flags, "sources": sources_digest(name), "nvrtc": version}
    key = store_key(facts)

    made: list[bytes] = []

    def build(folder: Path) -> None:
        made.append(compile_cubin(name, constants, architecture)[0])
        (folder / PLAN).write_bytes(made[0])

    try:
        return store.get_or_build(key, facts, build)
    except BackendError as error:
        cubin = made[0] if made else compile_cubin(name, constants, architecture)[0]
        logger.warning(NOT_KEPT, error)
        return cubin


def missing_bindings() -> str | None:
    """Why the kernels cannot be compiled (a missing package), or None."""
    try:
        bindings("driver")
        checked(bindings("nvrtc").nvrtcVersion(), 2)
    except (BackendError, RuntimeError) as error:  # the bindings load NVRTC's library at their first call
        return str(error).rstrip(".")
    return None


def _flags(constants: Mapping[str, int], architecture: str) -> list[str]:
    defined = [f"-D{name}={value}" for name, value in sorted(constants.items())]
    return [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v", *defined]


def bindings(name: str) -> Any:
    """A module of cuda.bindings.

    Raises:
        BackendError: the package is not installed.
    """
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise BackendError(f"the CUDA kernels need the package cuda-bindings ({error}).") from error


def checked(result: Any, values: int = 1) -> Any:
    """The results of a cuda.bindings call without its status: one value, several, or None.

    Raises:
        BackendError: the status is not success.
    """
    if int(result[0]):
        raise BackendError(f"CUDA reports {result[0]!s}.")
    return result[1] if len(result) == 2 and values == 1 else result[1:] or None
