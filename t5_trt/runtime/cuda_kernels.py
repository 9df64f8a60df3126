"""The library's own CUDA kernels: compiled by NVRTC for the GPU at hand when they are first wanted, launched on torch's stream.

They replace chains of small torch operations in the decoder step. cuda.bindings and NVRTC come with the extras for GPUs and with some
of PyTorch's CUDA builds; where one is missing, and on a CPU, callers use torch operations that compute the same.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from t5_trt.installation import install_command

logger = logging.getLogger("t5_trt")
THREADS = 256
#: beams whose rows a thread keeps in registers
MOST_BEAMS = 16
#: candidates that one thread of `beam_step` sorts
MOST_CANDIDATES = 64


def reorder_rows(kv: torch.Tensor, parents: torch.Tensor, position: torch.Tensor, beams: int) -> bool:
    """Let rows of a cache change places within their batch entries, up to a position.

    Args:
        kv: [L, 2, R, H, T, D] on a GPU, contiguous; row i gets what row ``parents[i]`` held.
        parents: int64 [r], of the first r rows, a multiple of `beams`; each names a row of its own batch entry.
        position: int64 [1], the last token that the cache holds.
        beams: N.

    Returns:
        Whether it was done; otherwise nothing has changed, and torch must do it.
    """
    layers, two, rows, heads, capacity, width = kv.shape
    vectors, rest = divmod(width * kv.element_size(), 16)
    if rest or rows % beams or len(parents) % beams or not 1 < beams <= MOST_BEAMS:
        return False
    function = _function("reorder_rows", kv.device.index, (f"-DBEAMS={beams}",))
    if function is None:
        return False
    grid = (-(-heads * capacity * vectors // THREADS), len(parents) // beams, layers * two)
    _launch(function, grid, kv.device, (kv, parents, position), (rows // beams, heads, capacity, vectors))
    return True


def token_step(buffers: tuple[torch.Tensor, ...], pad: int | None) -> bool:
    """What follows the choice of tokens, see ``kernels/token_step.cu``.

    Args:
        buffers: on a GPU, contiguous: the tokens chosen, int64 [R], which become those that count; then as
            `t5_trt.generation.sampling.TokenChoice` has them: tokens, finished, report, expired, eos; the position, int64 [1].
        pad: what stands behind the end of a row, or None.

    Returns:
        As `reorder_rows`.
    """
    chosen, tokens, *_, eos, _ = buffers
    function = _function("token_step", chosen.device.index, ())
    if function is None:
        return False
    numbers = (*tokens.shape, len(eos), int(pad is not None), pad or 0)
    _launch(function, (1, 1, 1), chosen.device, buffers, numbers)
    return True


def beam_step(buffers: tuple[torch.Tensor, ...], vocabulary: int, *, stops_early: bool, hopeful: bool) -> bool:
    """What follows the choice of candidates in a step of beam search, see ``kernels/beam_step.cu``.

    Args:
        buffers: on a GPU, contiguous, in the order and of the types of the kernel's arguments.
        vocabulary: V.
        stops_early: ``early_stopping`` is True.
        hopeful: rows are judged by the longest length there can be.

    Returns:
        As `reorder_rows`.
    """
    scores, _, tokens = buffers[:3]
    (batch, candidates), (_, beams, capacity), eos = scores.shape, tokens.shape, buffers[14]
    if beams > MOST_BEAMS or candidates > MOST_CANDIDATES:
        return False
    options = (f"-DBEAMS={beams}", f"-DCANDIDATES={candidates}")
    function = _function("beam_step", scores.device.index, options)
    if function is None:
        return False
    numbers = (vocabulary, capacity, len(eos), int(stops_early), int(hopeful))
    _launch(function, (batch, 1, 1), scores.device, buffers, numbers)
    return True


def _launch(
    function: Any,
    grid: tuple[int, int, int],
    device: torch.device,
    buffers: tuple[torch.Tensor, ...],
    sizes: tuple[int, ...],
) -> None:
    """Start a kernel that takes addresses and then ints."""
    from cuda.bindings import driver

    values = (*(buffer.data_ptr() for buffer in buffers), *sizes)
    types = (*(ctypes.c_void_p for _ in buffers), *(ctypes.c_int for _ in sizes))
    stream = torch.cuda.current_stream(device).cuda_stream
    _checked(driver.cuLaunchKernel(function, *grid, THREADS, 1, 1, 0, stream, (values, types), 0))


@cache
def _function(name: str, device: int | None, options: tuple[str, ...]) -> Any:
    """A kernel of ``kernels/NAME.cu`` for a GPU; None for the CPU, and where it cannot be compiled."""
    if device is None:
        return None
    try:
        from cuda.bindings import driver, nvrtc

        source = (files("t5_trt.runtime") / "kernels" / f"{name}.cu").read_bytes()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context current
            program = _checked(nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), 0, [], []))
            major, minor = torch.cuda.get_device_capability(device)
            flags = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *options]
            if int(nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])[0]):
                words = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
                nvrtc.nvrtcGetProgramLog(program, words)
                raise RuntimeError(words.decode(errors="replace").strip())
            code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
            _checked(nvrtc.nvrtcGetCUBIN(program, code))
            nvrtc.nvrtcDestroyProgram(program)
            module = _checked(driver.cuModuleLoadData(code))  # stays loaded, as its function is kept
            return _checked(driver.cuModuleGetFunction(module, name.encode()))
    except (ImportError, OSError, RuntimeError) as error:
        _warn_once(str(error).rstrip("."))
        return None


@cache
def _warn_once(reason: str) -> None:
    logger.warning(
        "the library's CUDA kernels are not all used, torch operations do their work, which takes longer: %s. They need "
        "cuda.bindings and NVRTC: `%s`.",
        reason,
        install_command("kernels"),
    )


def _checked(result: Any) -> Any:
    """The value that a call of cuda.bindings returned beside its status.

    Raises:
        RuntimeError: the status is not success.
    """
    if int(result[0]):
        raise RuntimeError(f"CUDA says {result[0]}")
    return result[1] if len(result) > 1 else None
