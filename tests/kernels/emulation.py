"""The encoder's kernels on a CPU: their own sources, compiled by the C++ compiler with emulated warps (``emulated_warp.h``)."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from t5_trt import kernels
from t5_trt.graph.architecture import Architecture
from t5_trt.kernels.decode_step import model_constants
from t5_trt.kernels.encoder import KERNELS, SOURCE, EncoderKernels

#: what is written in PTX; ``emulated_warp.h`` has functions of the same names
EMULATED = (
    "widen", "narrow", "narrow_two", "multiply_tiles", "copy_async", "copy_word_async", "end_group", "wait_for_group", "load_matrices",
    "load_transposed", "power_of_two",
)  # fmt: skip


class EmulatedKernels(EncoderKernels):
    """As `EncoderKernels`, in the host's memory.

    Args:
        arch: of the model.
        dtype: float16 or bfloat16.
        folder: for what is compiled.
    """

    def __init__(self, arch: Architecture, dtype: torch.dtype, folder: Path) -> None:
        wanted = model_constants(arch, dtype)
        self._library = compile_for_host(wanted, folder)
        numbers = (ctypes.c_int * 5).in_dll(self._library, "geometry")
        self._take_sizes(wanted, list(numbers), processors=8)

    def _launch(self, name: str, grid: tuple[int, ...], threads: int, *arguments: Any, shared: int = 0) -> None:
        assert shared <= 99 * 1024, "what a CTA may have on every GPU from compute capability 8.0 on"
        call(self._library, name, grid, threads, arguments)


def compile_for_host(wanted: dict[str, int], folder: Path) -> ctypes.CDLL:
    """A library with a function ``run_NAME`` for each kernel."""
    text = host_source()
    calls = "\n".join(entry(name, text) for name in KERNELS)
    return compiled_library(
        f'#include "{Path(__file__).parent / "emulated_warp.h"}"\n{text}\n{calls}\n', wanted, folder
    )


def compiled_library(source: str, wanted: dict[str, int], folder: Path) -> ctypes.CDLL:
    """A source with compile-time constants as a library."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "these tests need a C++ compiler"
    path, library = folder / "kernels.cpp", folder / "kernels.so"
    path.write_text(source)
    defined = [f"-D{name}={value}" for name, value in wanted.items()]
    # statics of templates would be one for all libraries of a process, whatever their sizes
    flags = ["-shared", "-fPIC", "-O2", "-std=c++17", "-w", "-fno-gnu-unique"]
    subprocess.run([compiler, *flags, *defined, "-o", str(library), str(path)], check=True)
    return ctypes.CDLL(str(library))


def call(library: ctypes.CDLL, name: str, grid: tuple[int, ...], threads: int, arguments: Sequence[Any]) -> None:
    """Run a kernel of a library."""
    values = [_value(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(
        *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values)
    )
    x, y, z = (*grid, 1, 1)[:3]
    getattr(library, f"run_{name}")(pointers, x, y, z, threads)


def host_source() -> str:
    """The kernels' source with its headers, less the functions that are emulated."""
    folder, text = Path(kernels.__file__).parent, ""
    for name in ("types.cuh", "tensor_cores.cuh", "encoder_attention.cuh", "encoder_rows.cuh", SOURCE):
        text += re.sub(r"#include .*|#pragma once", "", (folder / name).read_text())
    text = without(text.replace("extern __shared__", "extern").replace("__shared__", "static"), EMULATED)
    assert "asm" not in text
    return text


def without(text: str, names: Iterable[str]) -> str:
    """A source less some of its functions."""
    for name in names:
        pattern = rf"^(template <[\w ,]+> )?__device__ (__forceinline__|inline) [\w *]+[ *]{name}\([^)]*\)\s*\{{(.*\}}$|\n(.*\n)*?\}}$)"
        text, count = re.subn(pattern, "", text, flags=re.MULTILINE)
        assert count, name
    return text


def entry(name: str, text: str) -> str:
    """The function that runs a kernel of a source."""
    found = re.search(rf"\b{name}\(([^)]*)\)\s*\{{", text)
    assert found, name
    kinds = [re.sub(r"\w+$", "", parameter.strip()) for parameter in found[1].split(",")]
    arguments = ", ".join(f"*({kind}*)values[{index}]" for index, kind in enumerate(kinds))
    return (
        f'extern "C" void run_{name}(void** values, int x, int y, int z, int count)\n'
        f"{{ run_grid(x, y, z, count, [&] {{ {name}({arguments}); }}); }}"
    )


def _value(argument: Any) -> Any:
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())
