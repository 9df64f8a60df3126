"""For a CPU: models on stand-in TensorRT engines, and kernels that the C++ compiler compiled, threads one after the other."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from t5_trt import BuildConfig, TRTT5ForConditionalGeneration, kernels
from t5_trt.runtime import cuda_kernels
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import make_hugging_face

SHIM = """
#include <cmath>
#include <cstring>

#define LANES 1
#define __launch_bounds__(threads)
#define __syncwarp()
#define __all_sync(mask, value) (value)
#define __reduce_max_sync(mask, value) (value)
#define __reduce_min_sync(mask, value) (value)
#define __shfl_xor_sync(mask, value, step) (value)
static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
#define __global__
#define __device__
#define __shared__ static
#define __syncthreads()
#define __syncthreads_and(value) (value)
#define __syncthreads_or(value) (value)
#define __syncthreads_count(value) (int)(value)
#define DIVIDES 1
#define __logf(value) logf(value)
struct float4 { float x, y, z, w; };
#define __threadfence()
#define __threadfence_system()
struct uint4 { unsigned x, y, z, w; };
struct dim3 { int x, y, z; };
static dim3 blockIdx, blockDim, gridDim, threadIdx;
static int atomicAdd(int* address, int value) { int old = *address; *address += value; return old; }
#include "%s"
extern "C" void run(void** values, int gx, int gy, int gz, int threads)
{
    blockDim = {threads, 1, 1};
    gridDim = {gx, gy, gz};
    for (blockIdx.z = 0; blockIdx.z < gz; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gy; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gx; ++blockIdx.x)
                for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
                    %s;
}
"""


def call_of(name: str, source: str) -> str:
    """The call of a kernel with its arguments taken from addresses."""
    found = re.search(rf"{name}\(\s*(.*?)\)", source, flags=re.DOTALL)
    assert found
    arguments = []
    for index, parameter in enumerate(found[1].split(",")):
        kind = re.sub(r"\w+$", "", parameter.strip())
        arguments.append(f"({kind})values[{index}]" if "*" in kind else f"*({kind}*)values[{index}]")
    return f"{name}({', '.join(arguments)})"


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Kernels compiled by the C++ compiler, each once, by their names and options."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "these tests need a C++ compiler"

    @cache
    def compiled(name: str, options: tuple[tuple[str, int], ...]) -> Any:
        folder = tmp_path_factory.mktemp(name)
        source, library = folder / "kernel.cpp", folder / "kernel.so"
        kernel = Path(kernels.__file__).parent / f"{name}.cu"
        source.write_text(SHIM % (kernel, call_of(name, kernel.read_text())))
        flags = ["-shared", "-fPIC", "-O1", "-std=c++17", "-Wno-unknown-pragmas"]
        defined = [f"-D{option}={1 if option == 'WARPS' else value}" for option, value in options]
        subprocess.run([compiler, *flags, *defined, "-o", library, source], check=True)
        return ctypes.CDLL(str(library)).run

    return compiled


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, host_kernels: Callable[..., Any]) -> None:
    """Kernels compiled by the C++ compiler and launched on the host's memory."""

    def function(name: str, device: int, options: tuple[tuple[str, int], ...]) -> Any:
        return host_kernels(name, options)

    def launch(function: Any, grid: Any, threads: int, device: Any, buffers: Any, sizes: Any) -> None:
        pointers = [ctypes.c_void_p(None if buffer is None else buffer.data_ptr()) for buffer in buffers]
        numbers = [ctypes.c_int(size) for size in sizes]
        values = (ctypes.c_void_p * (len(pointers) + len(numbers)))(
            *pointers, *(ctypes.cast(ctypes.pointer(number), ctypes.c_void_p) for number in numbers)
        )
        function(values, *grid, cuda_kernels.THREADS)

    monkeypatch.setattr(cuda_kernels, "_function", function)
    monkeypatch.setattr(cuda_kernels, "_launch", launch)
    monkeypatch.setattr(cuda_kernels, "_runs_kernels", lambda device: True)


@pytest.fixture
def steps(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a kernel did a step, for every step; one thread for each block, as threads that wait cannot run in turn."""
    monkeypatch.setattr(cuda_kernels, "THREADS", 1)
    done: list[bool] = []
    for step in ("token_step", "beam_candidates", "beam_step"):
        real = getattr(cuda_kernels, step)
        monkeypatch.setattr(cuda_kernels, step, lambda *a, real=real, **k: done.append(real(*a, **k)) or done[-1])
    return done


@pytest.fixture
def make_pair(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(Hugging Face model, model whose session is a TrtSession on the stand-in)."""

    def make(kind: str, settings: BuildConfig | None = None, *, strict: bool = False) -> tuple[Any, Any]:
        hugging_face = make_hugging_face(kind)
        ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
        ours.session = stand_in_session(ours, monkeypatch, settings, strict=strict)
        return hugging_face, ours

    return make
