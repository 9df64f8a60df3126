"""The CUDA kernels' own logic, compiled for the CPU: threads one after the other. tests/gpu runs them on a GPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt.runtime import cuda_kernels
from t5_trt.runtime.trt_slot import reorder_rows
from tests.test_generate_parity import CORE, MORE, OTHER_LOOP, assert_same
from tests.tiny_models import batch

SHIM = """
#define __global__
#define __device__
#define __shared__ static
#define __syncthreads()
#define __syncthreads_and(value) (value)
#define __threadfence()
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


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels compiled by the C++ compiler and launched on the host's memory."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "these tests need a C++ compiler"
    serial = itertools.count()
    compiled: dict[Any, Any] = {}

    def function(name: str, device: int, options: tuple[str, ...]) -> Any:
        if (name, options) in compiled:
            return compiled[name, options]
        source, library = tmp_path / f"{name}{next(serial)}.cpp", tmp_path / f"{name}{next(serial)}.so"
        kernel = Path(cuda_kernels.__file__).parent / "kernels" / f"{name}.cu"
        source.write_text(SHIM % (kernel, call_of(name, kernel.read_text())))
        flags = ["-shared", "-fPIC", "-O1", "-std=c++17", "-Wno-unknown-pragmas"]
        subprocess.run([compiler, *flags, *options, "-o", library, source], check=True)
        compiled[name, options] = ctypes.CDLL(str(library)).run
        return compiled[name, options]

    def launch(function: Any, grid: Any, device: Any, buffers: Any, sizes: Any) -> None:
        pointers = [ctypes.c_void_p(buffer.data_ptr()) for buffer in buffers]
        numbers = [ctypes.c_int(size) for size in sizes]
        values = (ctypes.c_void_p * (len(pointers) + len(numbers)))(
            *pointers, *(ctypes.cast(ctypes.pointer(number), ctypes.c_void_p) for number in numbers)
        )
        function(values, *grid, cuda_kernels.THREADS)

    monkeypatch.setattr(cuda_kernels, "_function", function)
    monkeypatch.setattr(cuda_kernels, "_launch", launch)


@pytest.mark.parametrize(("entries", "unused", "beams"), [(1, 0, 4), (3, 1, 2), (2, 0, 5), (1, 0, 16)])
def test_rows_change_places(on_cpu: None, entries: int, unused: int, beams: int) -> None:
    generator = torch.Generator().manual_seed(entries * 100 + beams)
    rows = (entries + unused) * beams
    kv = torch.randn((3, 2, rows, 3, 32, 24), generator=generator).half()
    offset = torch.arange(entries)[:, None] * beams
    for filled in (0, 7, 31):
        parents = (torch.randint(0, beams, (entries, beams), generator=generator) + offset).flatten()
        position, before, expected = torch.tensor([filled]), kv.clone(), kv.clone()
        reorder_rows(expected, parents, position, beams)
        assert cuda_kernels.reorder_rows(kv, parents, position, beams)
        assert torch.equal(kv[..., : filled + 1, :], expected[..., : filled + 1, :])
        assert torch.equal(kv[..., filled + 1 :, :], before[..., filled + 1 :, :])


def test_what_the_kernel_does_not_take(on_cpu: None) -> None:
    parents, position = torch.arange(4), torch.tensor([3])
    assert not cuda_kernels.reorder_rows(torch.zeros(1, 2, 4, 1, 8, 4).half(), parents, position, 4)  # 8 bytes
    assert not cuda_kernels.reorder_rows(torch.zeros(1, 2, 4, 1, 8, 8), parents, position, 1)
    assert not cuda_kernels.reorder_rows(torch.zeros(1, 2, 6, 1, 8, 8), parents, position, 4)


@pytest.mark.parametrize("name", [name for name in {**CORE, **MORE} if name not in OTHER_LOOP])
def test_generates_as_stock(on_cpu: None, monkeypatch: pytest.MonkeyPatch, v11: Any, name: str) -> None:
    """Tokens, scores and beam indices; one thread for each block, as threads that wait for each other cannot run in turn."""
    monkeypatch.setattr(cuda_kernels, "THREADS", 1)
    used = []
    for step in ("token_step", "beam_step"):
        real = getattr(cuda_kernels, step)
        monkeypatch.setattr(cuda_kernels, step, lambda *a, real=real, **k: used.append(real(*a, **k)) or used[-1])
    stock, ours = v11
    arguments = {**batch(), "max_new_tokens": 12, **{**CORE, **MORE}[name]}
    results = []
    for model in (ours, stock):
        torch.manual_seed(11)
        results.append(model.generate(**arguments))
    assert_same(*results)
    assert all(used)


def test_without_a_gpu() -> None:
    """No cuda.bindings, or no GPU: torch does the work."""
    assert cuda_kernels._function("reorder_rows", 0, ("-DBEAMS=2",)) is None
    assert cuda_kernels._function("reorder_rows", None, ("-DBEAMS=2",)) is None
