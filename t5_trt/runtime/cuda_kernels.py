"""Our CUDA kernels around the decoder step: the token selection and the moves of beams, launched on torch's stream.

They replace chains of small torch operations. cuda.bindings and NVRTC come with the extras for GPUs and with some of PyTorch's CUDA
builds; where one is missing, and on a CPU, callers use torch operations that compute the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from t5_trt.config import default_engine_cache_dir
from t5_trt.engine.store import EngineStore
from t5_trt.errors import T5TRTError
from t5_trt.installation import install_command
from t5_trt.kernels.compile import architecture_name, bindings, checked, stored_cubin
from t5_trt.kernels.launching import launch
from t5_trt.runtime.session import MAILS, Hiding, Mailbox, NextStep

logger = logging.getLogger("t5_trt")
THREADS = 256
#: of a row whose token is chosen; the largest vocabulary of that kernel
CHOICE_THREADS, MOST_TOKENS = 1024, 1 << 20
_DRAWING_BLOCK = 256
#: beams whose rows a thread keeps in registers
MOST_BEAMS = 16
#: most candidates of a batch entry in a step of beam search
MOST_CANDIDATES = 64
#: tokens that a CTA of `beam_candidates` searches, and its warps: for small and for large vocabularies
SPAN, WARPS = 4096, 8
LARGE_SPAN, LARGE_WARPS, LARGE_VOCABULARY = 16384, 32, 1 << 16

Options = tuple[tuple[str, int], ...]


def reorder_rows(kv: torch.Tensor, parents: torch.Tensor, position: torch.Tensor, beams: int) -> bool:
    """Reorder rows of a cache within their batch entries, up to a position.

    Args:
        kv: [L, 2, R, H, T, D] on a GPU, contiguous; row i gets what row ``parents[i]`` held.
        parents: int64 [r], of the first r rows, a multiple of `beams`; each names a row of its own batch entry.
        position: int64 [1], of the last token in the cache.
        beams: N.

    Returns:
        Whether the kernel ran; otherwise nothing has changed, and the caller must use torch.
    """
    layers, two, rows, heads, capacity, width = kv.shape
    vectors, rest = divmod(width * kv.element_size(), 16)
    if rest or rows % beams or len(parents) % beams or not 1 < beams <= MOST_BEAMS:
        return False
    function = _function("reorder_rows", kv.device.index, (("BEAMS", beams),))
    if function is None:
        return False
    grid = (-(-heads * capacity * vectors // THREADS), len(parents) // beams, layers * two)
    _launch(function, grid, THREADS, kv.device, (kv, parents, position), (rows // beams, heads, capacity, vectors))
    return True


def token_step(
    buffers: tuple[torch.Tensor, ...],
    position: torch.Tensor,
    pad: int | None,
    following: NextStep | None,
    mailbox: Mailbox | None = None,
) -> bool:
    """Update all state after the token selection, see ``kernels/token_step.cu``.

    Args:
        buffers: on a GPU, contiguous: the tokens chosen, int64 [R], which become those that count; then as
            `t5_trt.generation.sampling.RowTokenSelector` has them: tokens, finished, report, expired, eos.
        position: int64 [1].
        pad: token id that pads rows after their end, or None.
        following: what the next step reads; with ``best``, that says what is chosen.
        mailbox: gets the report.

    Returns:
        As `reorder_rows`.
    """
    chosen, tokens, *_, eos = buffers
    function = _function("token_step", chosen.device.index, ())
    if function is None:
        return False
    following = following or NextStep()
    pointers = (chosen, following.best, *buffers[1:], position, following.tokens, following.positions, *_mail(mailbox))
    numbers = (*tokens.shape, len(eos), int(pad is not None), pad or 0, following.position_count, MAILS)
    _launch(function, (1, 1, 1), THREADS, chosen.device, pointers, numbers)
    return True


def beam_lists(scores: torch.Tensor, candidates: int, beams: int) -> tuple[torch.Tensor, ...] | None:
    """Memory for `beam_candidates`: scores float32 and tokens int32 [R, spans, K], and float32 [R, spans, 2]; None without a kernel."""
    if not _runs_kernels(scores.device) or beams > MOST_BEAMS or candidates > MOST_CANDIDATES:
        return None
    rows, vocabulary = scores.shape
    shape = (rows, -(-vocabulary // _span(vocabulary)[0]), candidates)
    found = scores.new_empty(shape)
    return found, torch.empty_like(found, dtype=torch.int32), scores.new_empty((*shape[:2], 2))


def beam_candidates(
    scores: torch.Tensor,
    lists: Sequence[torch.Tensor],
    position: torch.Tensor,
    hiding: Hiding | None,
    *,
    normalized: bool,
) -> bool:
    """Find the best tokens of every span of every row, see ``kernels/beam_candidates.cu``.

    Args:
        scores: float32 [R, V] on a GPU, contiguous: logits, or with `normalized` what is a logarithm of a probability already.
        lists: see `beam_lists`.
        position: int64 [1].
        hiding: tokens that are no candidates.
        normalized: leave out what a softmax needs.

    Returns:
        As `reorder_rows`.
    """
    rows, spans, candidates = lists[0].shape
    span, warps = _span(scores.shape[1])
    options = (("SPAN", span), ("WARPS", warps), ("CANDIDATES", candidates))
    function = _function("beam_candidates", scores.device.index, options)
    if function is None:
        return False
    hidden = (None, None) if hiding is None else (hiding.tokens, hiding.until)
    numbers = (scores.shape[1], int(normalized))
    _launch(function, (spans, rows, 1), warps * 32, scores.device, (scores, *lists, *hidden, position), numbers)
    return True


def beam_step(
    made: tuple[torch.Tensor | None, ...],
    buffers: tuple[torch.Tensor, ...],
    vocabulary: int,
    *,
    stops_early: bool,
    hopeful: bool,
    following: NextStep | None,
    mailbox: Mailbox | None = None,
) -> bool:
    """Run the rest of a beam-search step after the selection of candidates, see ``kernels/beam_step.cu``.

    Args:
        made: candidates; on a GPU, contiguous: scores float32 and places int64 [B, K], or None twice and then what `beam_candidates` left,
            with None for the statistics where its scores were normalized.
        buffers: the next arguments of the kernel, from its ``tokens`` to its ``counters``.
        vocabulary: V.
        stops_early: ``early_stopping`` is True.
        hopeful: bounds on scores use the maximum length.
        following: what the next step reads.
        mailbox: gets the report.

    Returns:
        As `reorder_rows`.
    """
    scores, _, found, *_ = made
    tokens, eos = buffers[0], buffers[12]
    batch, beams, capacity = tokens.shape
    spans, candidates = (0, scores.shape[1]) if found is None else found.shape[1:]  # type: ignore[union-attr]
    if beams > MOST_BEAMS or candidates > MOST_CANDIDATES:
        return False
    options = (("BEAMS", beams), ("CANDIDATES", candidates), ("SPANS", spans))
    function = _function("beam_step", tokens.device.index, options)
    if function is None:
        return False
    following = following or NextStep()
    stride = 0 if following.ancestors is None else following.ancestors.shape[1]
    numbers = (vocabulary, capacity, len(eos), int(stops_early), int(hopeful), following.position_count, stride, MAILS)
    pointers = (*made, *buffers, following.tokens, following.positions, following.ancestors, *_mail(mailbox))
    _launch(function, (batch, 1, 1), THREADS, tokens.device, pointers, numbers)
    return True


def choice_kernels(device: torch.device, vocabulary: int) -> bool:
    """Whether `edit_scores` and `choose_tokens` run on a device, for a number of tokens."""
    if not _runs_kernels(device) or vocabulary > MOST_TOKENS:
        return False
    return all(_function(name, device.index, ()) is not None for name in ("edit_scores", "choose_tokens"))


def edit_scores(
    scores: torch.Tensor,
    rules: torch.Tensor,
    tokens: torch.Tensor,
    ends: torch.Tensor,
    position: torch.Tensor | None,
    rows: int,
) -> None:
    """Write into scores what the tokens that rows have do to them, see ``kernels/edit_scores.cu``.

    Args:
        scores: float32 [R, V] where there are `choice_kernels`, like all tensors contiguous.
        rules: int64 [r, 14], entries of `t5_trt.generation.token_rules.RULES`, or [1, 14] for all r rows.
        tokens: int64 [r or more, M].
        ends: int64 [r, E], end tokens, or [1, E] likewise.
        position: int64 [1], of the last token, where rules have no lengths.
        rows: r.
    """
    numbers = (int(len(rules) > 1), tokens.shape[1], ends.shape[1], scores.shape[1])
    function = _function("edit_scores", scores.device.index, ())
    _launch(function, (rows, 1, 1), THREADS, scores.device, (scores, rules, tokens, ends, position), numbers)


def choose_tokens(
    scores: torch.Tensor,
    rules: torch.Tensor,
    variates: torch.Tensor | None,
    chosen: torch.Tensor,
    rows: int,
    tokens: torch.Tensor | None = None,
) -> None:
    """Choose a token of every row, see ``kernels/choose_tokens.cu``.

    Args:
        scores: float32 [R, V], as of `edit_scores`.
        rules: likewise.
        variates: exponential ones, float32 [R, V]; None takes those of the generators that the rules name.
        chosen: int64 [R], gets the tokens of the r rows.
        rows: r.
        tokens: as of `edit_scores`, which gets them, too, where rules have slots and lengths.
    """
    capacity = 0 if tokens is None else tokens.shape[1]
    numbers = (int(len(rules) > 1), scores.shape[1], drawing_threads(scores.shape[1], scores.device), capacity)
    function = _function("choose_tokens", scores.device.index, ())
    pointers = (scores, rules, variates, chosen, tokens)
    _launch(function, (rows, 1, 1), CHOICE_THREADS, scores.device, pointers, numbers)


@cache
def drawing_threads(count: int, device: torch.device) -> int:
    """Threads by which torch draws random numbers for a tensor of `count` elements on a GPU.

    Source: ``calc_execution_policy`` in aten/src/ATen/native/cuda/DistributionTemplates.h.
    """
    blocks = -(-count // _DRAWING_BLOCK)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        blocks = min(
            blocks, properties.multi_processor_count * (properties.max_threads_per_multi_processor // _DRAWING_BLOCK)
        )
    return blocks * _DRAWING_BLOCK


def drawn(count: int, device: torch.device) -> int:
    """By how much a generator's offset grows when torch draws for `count` elements; the same source."""
    return ((count - 1) // (drawing_threads(count, device) * 4) + 1) * 4


def mailbox(report: torch.Tensor) -> Mailbox | None:
    """A mailbox for the reports of a token selector's kernels; None if there are no kernels."""
    return Mailbox(len(report), report.device) if _runs_kernels(report.device) else None


def _mail(mailbox: Mailbox | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A mailbox's memory and request number as kernel arguments; marks the mailbox as in use."""
    if mailbox is None:
        return None, None
    mailbox.in_use = True
    return mailbox.memory, mailbox.epoch


def _span(vocabulary: int) -> tuple[int, int]:
    """Tokens that a CTA of `beam_candidates` searches, and its warps."""
    return (LARGE_SPAN, LARGE_WARPS) if vocabulary > LARGE_VOCABULARY else (SPAN, WARPS)


def _runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def _launch(
    function: Any,
    grid: tuple[int, int, int],
    threads: int,
    device: torch.device,
    buffers: Sequence[torch.Tensor | None],
    sizes: tuple[int, ...],
) -> None:
    """Launch a kernel that takes addresses (None as 0) and then ints."""
    stream = torch.cuda.current_stream(device).cuda_stream
    early = torch.cuda.get_device_capability(device)[0] >= 9
    launch(function, grid, threads, stream, (*buffers, *sizes), early=early)


@cache
def _function(name: str, device: int | None, options: Options) -> Any:
    """A kernel of ``kernels/NAME.cu`` for a GPU; None for the CPU, and where it cannot be compiled."""
    if device is None:
        return None
    try:
        driver = bindings("driver")
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context current
            major, minor = torch.cuda.get_device_capability(device)
            cubin = stored_cubin(
                f"{name}.cu", dict(options), architecture_name(major, minor), EngineStore(default_engine_cache_dir())
            )
            module = checked(driver.cuModuleLoadData(cubin))  # kept loaded, as the function is cached
            return checked(driver.cuModuleGetFunction(module, name.encode()))
    except (T5TRTError, OSError, RuntimeError) as error:
        _warn_once(str(error).rstrip("."))
        return None


@cache
def _warn_once(reason: str) -> None:
    logger.warning(
        "our CUDA kernels are not all used, torch operations do their work, which takes longer: %s. They need cuda.bindings and NVRTC: "
        "`%s`.",
        reason,
        install_command("kernels"),
    )
