"""The decoder's products on a CPU: their own sources, compiled by the C++ compiler with emulated warps (``emulated_step.h``)."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import torch

from t5_trt import kernels
from t5_trt.graph.architecture import Architecture
from t5_trt.kernels.decode_step import PRODUCTS, Geometry, constants
from tests.kernels.emulation import call, compiled_library, entry, without

KERNELS = ("embed", *PRODUCTS)
#: file -> its functions that are written in PTX, or whose callers differ on a CPU
EMULATED = {
    "launch.cuh": ("let_next_start", "wait_for_inputs", "send_report"),
    "types.cuh": ("widen", "narrow", "narrow_two"),
    "tensor_cores.cuh": ("multiply_tiles", "copy_async", "copy_word_async", "end_group", "wait_for_group"),
    "common.cuh": ("load_streaming", "load_before_wait", "load_in_order"),
    "norm.cuh": (),
    "int8_weights.cuh": ("subtract_two",),
    "operands.cuh": ("count_from", "prefetch"),
    "product.cuh": (),
    "product_kernel.cuh": (),
    "streamed_product.cuh": (),
    "warpgroup.cuh": ("begin_products", "end_products", "wait_for_products", "show_to_products", "multiply_group"),
    "split_product.cuh": (
        "arrive_at_cluster",
        "wait_for_cluster",
        "open_mailbox",
        "send",
        "has_come",
        "stop_kernel",
        "meet_threads",
    ),
    "tiled_copies.cuh": (),
    "tiled_product.cuh": (),
    "group_product.cuh": (),
    "layers.cuh": (),
    "ends.cuh": (),
}


class EmulatedStep:
    """The products of a step, on tensors in the host's memory; all kernels but attention's.

    Args:
        arch: of the model.
        rows: of a step, on a GPU of compute capability 9.0.
        int8: weights are in 8 bits, else float16.
        folder: for what is compiled.
        division: constants in place of those that are chosen.
    """

    def __init__(self, arch: Architecture, rows: int, *, int8: bool, folder: Path, **division: int) -> None:
        self.constants = wanted = constants(arch, torch.float16, rows, 9, int8=int8) | division
        text = host_source()
        source = f'#include "{Path(__file__).parent / "emulated_step.h"}"\n{text}\n' + "\n".join(
            entry(name, text) for name in KERNELS
        )
        self._library = compiled_library(source, wanted, folder)
        self.geometry = Geometry.of_products((ctypes.c_int * (4 * len(PRODUCTS))).in_dll(self._library, "geometry"))
        threads = list((ctypes.c_int * len(KERNELS)).in_dll(self._library, "threads_of"))
        self._threads = dict(zip(KERNELS, threads, strict=True))

    def launch(self, name: str, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
        """Run a kernel; as of `t5_trt.kernels.decode_step.DecodeKernels`."""
        cluster = self.geometry[name].cluster if name in self.geometry else 1
        ctypes.c_int.in_dll(self._library, "cluster_ctas").value = cluster
        call(self._library, name, grid, self._threads[name], arguments)


def host_source() -> str:
    """The kernels' source with its headers, less the functions that are emulated."""
    folder, text = Path(kernels.__file__).parent, ""
    for name, emulated in EMULATED.items():
        own = re.sub(r"#include .*|#pragma once|extern __shared__ .*", "", (folder / name).read_text())
        text += without(own, emulated)
    geometry = (folder / "decode_step.cu").read_text()
    text += "constexpr int SHARERS = 1;\n"  # attention is not emulated here
    text += geometry[geometry.index("#define OF") :]
    products = ["QkvProduct", "AddProduct", "QueryProduct", "InProduct", "OutProduct"]
    threads = ", ".join(("EMBED_THREADS", *(f"{product}::THREADS" for product in products), "HEAD_WARPS * 32"))
    text += f'extern "C" {{ int threads_of[] = {{{threads}}}; }}\n'
    assert "asm" not in text
    return text.replace("__shared__", "static")
