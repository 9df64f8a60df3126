"""The largest of many scores on a CPU, without torch's passes over all of them in one thread and one at a time.

T5 has 32128 tokens: for one row `torch.argmax` takes 74 us where NumPy takes 3, and ``topk`` over 4 beams 415 us (Intel Xeon). Once the
C code of the decoder is loaded, its functions do this, else torch.
"""

from __future__ import annotations

import torch

from t5_trt.kernels import cpu_tokens
from t5_trt.kernels.cpu_compile import loaded_library

#: scores that share a maximum
_GROUP = 256


def best(scores: torch.Tensor) -> torch.Tensor:
    """The index of the largest score of each row, the first of equal ones: ``scores.argmax(-1)``.

    Args:
        scores: [rows, V] without a gradient; NumPy looks through float32 on a CPU.

    Returns:
        int64 [rows].
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32:  # a user's processor may give another type
        return scores.argmax(-1)
    return torch.from_numpy(scores.detach().numpy().argmax(-1))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """The log-softmax of each row, in new memory.

    Args:
        logits: float32 [rows, V].
    """
    library = loaded_library()
    if library is None or not cpu_tokens.reads(logits):
        return torch.nn.functional.log_softmax(logits, dim=-1)
    return cpu_tokens.log_softmax(library, logits)


def largest_log_sums(
    logits: torch.Tensor, added: torch.Tensor, count: int, below: float, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`largest_sums` of the log-softmax of logits, which is written nowhere.

    Args:
        logits: float32 [B * N, V].
        added: as of `largest_sums`, like `count` and `below`.
        count: of results for each batch entry.
        below: results with a sum up to this are not given.
        hidden: uint8 [V], 1 for tokens that get no probability; None for none.

    Returns:
        What `largest_sums` returns; None where the C code is not loaded or not for these tensors, and where `largest_sums` takes
        those of ``topk``.
    """
    library = loaded_library()
    if library is None or not cpu_tokens.reads(logits, added) or count > logits.shape[-1]:
        return None
    values, places = cpu_tokens.best_sums(library, logits, added, count, normalizes=True, hidden=hidden)
    return (values, places) if _all_above(values, below) else None


def largest_sums(
    scores: torch.Tensor, added: torch.Tensor, count: int, below: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best continuations of beams: ``(scores + added).topk(count)`` over all tokens of all beams of a batch entry.

    The largest `count` sums lie in the `count` groups of neighbours whose maxima are the largest. Which of equal sums are given can
    differ from ``topk``.

    Args:
        scores: float32 [B * N, V].
        added: float32 [B, N], the score of each beam.
        count: of results for each batch entry.
        below: sums up to this are masked, many of them equal; results with one of them are those of ``topk``.

    Returns:
        The sums in falling order, and their places among N * V, [B, count] each.
    """
    batch, beams = added.shape
    size = scores.shape[-1]
    library = loaded_library()
    if library is not None and cpu_tokens.reads(scores, added) and count <= size:
        values, places = cpu_tokens.best_sums(library, scores, added, count)
        return (values, places) if _all_above(values, below) else _topk(scores, added, count)
    groups = size // _GROUP
    if scores.device.type != "cpu" or groups * beams <= count:
        return _topk(scores, added, count)
    # row by row: torch's threads, once woken up, spin for a while and take the processor from ONNX Runtime's
    maxima = torch.stack([row[: groups * _GROUP].view(groups, _GROUP).amax(-1) for row in scores])
    found = (maxima.view(batch, beams, groups) + added[..., None]).view(batch, -1).topk(count).indices
    starts = found // groups * size + found % groups * _GROUP
    places = (starts[..., None] + torch.arange(_GROUP)).flatten(1)
    rest = (torch.arange(beams)[:, None] * size + torch.arange(groups * _GROUP, size)).flatten()
    places = torch.cat((places, rest.expand(batch, -1)), 1)
    sums = scores.reshape(batch, -1).gather(1, places) + added.gather(1, places // size)
    values, chosen = sums.topk(count)
    if not _all_above(values, below):
        return _topk(scores, added, count)
    return values, places.gather(1, chosen)


def _all_above(values: torch.Tensor, below: float) -> bool:
    """Whether all values are larger, none of them NaN."""
    return bool((values.numpy() > below).all())


def _topk(scores: torch.Tensor, added: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    sums = scores.reshape(*added.shape, -1) + added[..., None]
    values, places = sums.flatten(1).topk(count)
    return values, places
