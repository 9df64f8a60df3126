"""What a search does with logits on a CPU, by our own C code (`t5_trt/kernels/cpu/tokens.h`), in the calling thread.

For tensors that `reads` accepts, the results are those of torch's operations within float32's rounding.
"""

from __future__ import annotations

import ctypes

import torch


def reads(*tensors: torch.Tensor) -> bool:
    """Whether the C code can read these tensors: float32 in the memory of a CPU, contiguous, without a gradient."""
    return all(
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
        and not tensor.requires_grad
        for tensor in tensors
    )


def log_softmax(library: ctypes.CDLL, logits: torch.Tensor) -> torch.Tensor:
    """The log-softmax of each row.

    Args:
        library: of `t5_trt.kernels.cpu_compile.load_library`.
        logits: float32 [rows, V].
    """
    made = torch.empty_like(logits)
    library.t5_log_softmax(logits.data_ptr(), *logits.shape, made.data_ptr())
    return made


def best_sums(
    library: ctypes.CDLL,
    scores: torch.Tensor,
    added: torch.Tensor,
    count: int,
    *,
    normalizes: bool = False,
    hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest sums over all tokens of all beams of a batch entry, the first of equal ones first.

    Args:
        library: of `t5_trt.kernels.cpu_compile.load_library`.
        scores: float32 [B * N, V].
        added: float32 [B, N], the score of each beam.
        count: of results for each batch entry, at most N * V.
        normalizes: sum the log-softmax of `scores`.
        hidden: uint8 [V], 1 for tokens that count as -inf; None hides none.

    Returns:
        The sums in falling order, and their places among N * V, [B, count] each. If there is NaN among the scores of an entry, all its
        sums are NaN, and the places have no meaning.
    """
    batch, beams = added.shape
    values = torch.empty((batch, count), dtype=torch.float32)
    places = torch.empty((batch, count), dtype=torch.int64)
    library.t5_best_sums(
        scores.data_ptr(),
        added.data_ptr(),
        None if hidden is None else hidden.data_ptr(),
        int(normalizes),
        batch,
        beams,
        scores.shape[-1],
        count,
        values.data_ptr(),
        places.data_ptr(),
    )
    return values, places
