"""Is a model right? Its tokens and logits against the stock class, and the block where they part.

Nothing here is on the way of a request; `t5-trt verify` and the GPU tests call it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.engine.profiles import SMALLEST, bucket
from t5_trt.errors import BackendError
from t5_trt.modeling import TRTT5ForConditionalGeneration
from t5_trt.runtime.buffers import layer_views
from t5_trt.signature import ENCODER, QUERIES


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        sequences: compared.
        equal: of them, token for token.
        first_difference: (sequence, position) of the first token that differs, or None.
        max_logit_error: largest absolute difference, decoder fed with the stock class's tokens.
        relative_logit_error: L2 of the difference over L2 of the logits.
    """

    sequences: int
    equal: int
    first_difference: tuple[int, int] | None
    max_logit_error: float
    relative_logit_error: float


@dataclass(frozen=True)
class BlockError:
    """How far the residual stream after one block is off.

    Attributes:
        name: such as "decoder.block.3".
        max_error: largest absolute difference.
        mean_error: mean absolute difference.
        relative_error: L2 of the difference over L2 of the stock class's values.
    """

    name: str
    max_error: float
    mean_error: float
    relative_error: float


def verify(
    model: TRTT5ForConditionalGeneration, batches: Iterable[dict[str, torch.Tensor]], **generate: Any
) -> Verification:
    """Compare greedy (or, with ``num_beams``, beam) output and logits with ``model.reference``.

    Args:
        model: under test.
        batches: of ``input_ids`` and ``attention_mask``, int64 [B, S], anywhere.
        generate: arguments of ``generate()``, such as ``max_new_tokens``.

    Raises:
        StrictModeError: the model was loaded with ``strict=True``: it has no reference.
    """
    reference = model.reference
    sequences = equal = 0
    first: tuple[int, int] | None = None
    largest = difference = total = 0.0
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.no_grad():
            expected = reference.generate(**inputs, **generate)
            got = model.generate(**inputs, **generate)
            width = max(expected.shape[1], got.shape[1])
            expected, got = (_padded(tokens, width, model.config.pad_token_id) for tokens in (expected, got))
            same = (expected == got).all(dim=1)
            if first is None and not same.all():
                row = int((~same).nonzero()[0])
                first = (sequences + row, int((expected[row] != got[row]).nonzero()[0]))
            sequences, equal = sequences + len(same), equal + int(same.sum())
            forced = {**inputs, "decoder_input_ids": expected[:, :-1]}
            wanted, found = reference(**forced).logits.float(), model(**forced).logits.float()
        largest = max(largest, float((found - wanted).abs().nan_to_num(nan=torch.inf).max()))
        difference += float((found - wanted).square().sum())
        total += float(wanted.square().sum())
    relative = (difference / max(total, 1e-30)) ** 0.5
    return Verification(sequences, equal, first, largest, relative)


def block_errors(
    model: TRTT5ForConditionalGeneration, batch: dict[str, torch.Tensor], decoder_input_ids: torch.Tensor
) -> list[BlockError]:
    """The error after every block against ``model.reference``, for one padded batch.

    Args:
        model: under test.
        batch: ``input_ids`` and ``attention_mask``, int64 [B, S].
        decoder_input_ids: int64 [B, Q], starting with the decoder's start token.

    Returns:
        One entry a block, encoder first; the last entry of the encoder is its output and that of the decoder its logits.

    Raises:
        BackendError: Polygraphy, which compares, is not installed.
    """
    device, arch = model.device, model.architecture
    reference, session = model.reference, model.session
    ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
    tokens = decoder_input_ids.to(device)
    with torch.no_grad():
        stock = reference(
            input_ids=ids, attention_mask=mask, decoder_input_ids=tokens, output_hidden_states=True, use_cache=False
        )
    rows, source = bucket("B", len(ids)), bucket("S", ids.shape[1])
    count, cached = bucket("Q", tokens.shape[1]), SMALLEST["T"]
    wide_ids, wide_mask = _grown(ids, rows, source), _grown(mask, rows, source)
    encoder = session.streams(ENCODER, {"input_ids": wide_ids, "attention_mask": wide_mask})
    _, cross = session.encode(wide_ids, None, wide_mask)
    heads, width = arch.num_heads, arch.d_kv
    zeros = {"device": device, "dtype": session.dtype}
    past = torch.zeros((arch.decoder_layers, 2, rows, heads, cached, width), **zeros)  # type: ignore[call-overload]
    inputs = {
        "decoder_input_ids": _grown(tokens, rows, count),
        "position": torch.zeros(1, dtype=torch.int64, device=device),
        "cross_bias": session.cross_bias(wide_mask, cross),
        "key_bias": torch.zeros((rows, 1, 1, cached + count), **zeros),  # type: ignore[call-overload]
    }
    decoder = session.streams(QUERIES, inputs | layer_views("past", past) | layer_views("cross", cross.kv))
    keep = mask.bool()
    found, wanted = {}, {}
    for layer in range(arch.encoder_layers - 1):  # the stock class hands out its last state behind the last norm only
        name = f"encoder.block.{layer}"
        found[name] = encoder[name].view(rows, source, -1)[: len(ids), : ids.shape[1]][keep]
        wanted[name] = stock.encoder_hidden_states[layer + 1][keep]
    found["encoder output"] = encoder["encoder_hidden_states"].view(rows, source, -1)[: len(ids), : ids.shape[1]][keep]
    wanted["encoder output"] = stock.encoder_last_hidden_state[keep]
    for layer in range(arch.decoder_layers - 1):
        name = f"decoder.block.{layer}"
        found[name] = decoder[name].view(rows, count, -1)[: len(ids), : tokens.shape[1]]
        wanted[name] = stock.decoder_hidden_states[layer + 1]
    found["logits"] = decoder["logits"].view(rows, count, -1)[: len(ids), : tokens.shape[1]]
    wanted["logits"] = stock.logits
    return _compare(found, wanted)


def _compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[BlockError]:
    """Polygraphy's comparison of the outputs of two runs."""
    try:
        from polygraphy import comparator
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise BackendError(f"comparing layers needs Polygraphy ({error}): pip install 't5-trt[verify]'.") from error
    simple = getattr(comparator, "SimpleCompareFunc", None) or comparator.CompareFunc.simple  # renamed in 0.50
    results = []
    for runner, tensors in (("t5_trt", found), ("transformers", wanted)):
        arrays = {name: t.float().cpu().flatten(0, -2).contiguous().numpy() for name, t in tensors.items()}
        results.append(comparator.IterationResult(arrays, runner_name=runner))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        compared = simple(fail_fast=False)(*results)
    errors = []
    for name, tensor in wanted.items():
        stats = compared[name]
        relative = (found[name].float() - tensor.float()).norm() / tensor.float().norm().clamp_min(1e-30)
        errors.append(BlockError(name, float(stats.max_absdiff), float(stats.mean_absdiff), float(relative)))
    return errors


def _padded(tokens: torch.Tensor, width: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=value)


def _grown(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Zeros behind the rows and columns."""
    grown = tensor.new_zeros((rows, columns))
    grown[: tensor.shape[0], : tensor.shape[1]] = tensor
    return grown
