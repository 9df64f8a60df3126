"""Checks of arguments of `forward` and `generate`. Messages say what was got, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch

from t5_trt.errors import InputError

#: ``dtype`` argument -> precision
PRECISION_OF = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def check_token_ids(name: str, ids: Any, vocab_size: int, device: torch.device, *, values: bool = True) -> torch.Tensor:
    """Return token ids as int64 [rows, tokens] on `device`.

    Args:
        name: of the argument, for messages.
        ids: what the caller gave.
        vocab_size: V.
        device: of the engine.
        values: also check the ids themselves (on a GPU this waits for it).

    Raises:
        InputError: not a tensor, not two axes, not integers, empty, or an id outside 0..V-1.
    """
    if not isinstance(ids, torch.Tensor):
        raise InputError(
            f"{name} got {type(ids).__name__}; expected a torch.Tensor of token ids [batch, tokens]. A tokenizer gives "
            "one with return_tensors='pt'."
        )
    if ids.dtype not in _INTEGERS:
        raise InputError(f"{name} got dtype {ids.dtype}; expected integer token ids (torch.int64). Embeddings go in "
                         f"{'inputs_embeds' if name == 'input_ids' else 'decoder_inputs_embeds'}.")  # fmt: skip
    if ids.dim() != 2:
        raise InputError(f"{name} got shape {tuple(ids.shape)}; expected [batch, tokens].")
    if ids.numel() == 0:
        raise InputError(
            f"{name} got shape {tuple(ids.shape)}, which is empty; expected at least one row of one token."
        )
    if values:
        low, high = _extremes(ids)
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"{name} got the id {low if low < 0 else high}; expected ids from 0 to {vocab_size - 1}, the rows of this "
                "model's embedding. Check that the tokenizer belongs to the checkpoint."
            )
    return ids.to(device=device, dtype=torch.int64)


def _extremes(ids: torch.Tensor) -> tuple[int, int]:
    """The smallest and the largest id."""
    if ids.device.type == "cpu":  # by NumPy in a tenth of the time
        array = ids.numpy()
        return int(array.min()), int(array.max())
    low, high = torch.stack(torch.aminmax(ids)).tolist()  # together, to wait for the GPU once
    return low, high


def check_embeds(name: str, embeds: Any, d_model: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return embeddings or encoder states as [rows, tokens, E] of the engine's device and dtype.

    Raises:
        InputError: not a floating-point tensor of that shape, or empty.
    """
    if not isinstance(embeds, torch.Tensor) or not embeds.is_floating_point():
        got = embeds.dtype if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise InputError(f"{name} got {got}; expected a floating-point tensor [batch, tokens, {d_model}].")
    if embeds.dim() != 3 or embeds.shape[2] != d_model or embeds.numel() == 0:
        raise InputError(f"{name} got shape {tuple(embeds.shape)}; expected [batch, tokens, {d_model}], not empty.")
    return embeds.detach().to(device=device, dtype=dtype)


def check_texts(texts: Iterable[Any]) -> list[Any]:
    """Texts, or objects in their place, as a list.

    Raises:
        InputError: they are one string, whose characters would be taken for texts.
    """
    if isinstance(texts, str):
        raise InputError("texts got one string; expected several. Pass [text], or a file's lines.")
    return list(texts)


def check_mask(name: str, mask: Any, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Return a mask as int64 [rows, tokens] of zeros and ones on `device`; None becomes all ones.

    Raises:
        InputError: not a tensor of that shape.
    """
    if mask is None:
        return torch.ones((rows, tokens), dtype=torch.int64, device=device)
    if not isinstance(mask, torch.Tensor):
        raise InputError(f"{name} got {type(mask).__name__}; expected a torch.Tensor [{rows}, {tokens}].")
    if tuple(mask.shape) != (rows, tokens):
        raise InputError(
            f"{name} got shape {tuple(mask.shape)}; expected [{rows}, {tokens}], one value per token, 0 for padding."
        )
    if device.type == "cpu" and mask.device == device and mask.dtype == torch.int64:
        # NumPy keeps Python's interpreter, which torch's operations hand to other threads for a while
        return torch.from_numpy((mask.numpy() != 0).astype(np.int64))
    return (mask.to(device) != 0).long()


def check_decoder_mask(mask: Any, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Return ``decoder_attention_mask`` as `check_mask` does, fitted to the decoder's tokens as the Hugging Face class does it.

    Entries beyond the tokens are left out (evaluation loops hand over the mask of the labels); tokens beyond the mask are hidden.

    Args:
        mask: [rows, any number].
        rows: R.
        tokens: in the cache and new.
        device: of the result.

    Raises:
        InputError: not a tensor of so many rows.
    """
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] != tokens:
        mask = torch.nn.functional.pad(mask, (0, tokens - mask.shape[1]))  # a negative width cuts
    return check_mask("decoder_attention_mask", mask, rows, tokens, device)


def check_reference_mask(
    name: str, mask: Any, heads: int, queries: list[torch.Tensor], keys: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Return a mask that the Hugging Face model can broadcast: one of two axes as `check_mask`, one of four axes to be added.

    Eager attention would add a boolean one of four axes as zeros and ones.

    Args:
        name: of the mask.
        mask: [batch, keys]; or [batch, heads, queries, keys], or with 1 in place of any of these but the last.
        heads: of the model.
        queries: token ids [rows, tokens] that attend through it; each of them must go with the mask.
        keys: token ids that are attended to; None if there may be others.
        device: of the model.

    Raises:
        InputError: naming both shapes.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise InputError(f"{name} got {type(mask).__name__}; expected a torch.Tensor [batch, tokens].")
    rows = len(queries[0]) if queries else len(mask) if mask.dim() else 0
    if mask.dim() == 2:
        return check_mask(name, mask, rows, mask.shape[1] if keys is None else keys.shape[1], device)
    fits = mask.dim() == 4 and mask.numel() > 0 and mask.shape[1] in (1, heads)
    fits = fits and all(mask.shape[0] in (1, len(ids)) and mask.shape[2] in (1, ids.shape[1]) for ids in queries)
    if not fits or (keys is not None and mask.shape[3] != keys.shape[1]):
        places = "queries" if not queries else " and ".join(str(ids.shape[1]) for ids in queries)
        raise InputError(
            f"{name} got shape {tuple(mask.shape)}; expected [{rows}, {'tokens' if keys is None else keys.shape[1]}], one value "
            f"per token, 0 for padding; or for the Hugging Face model four axes, [{rows}, {heads}, {places}, tokens], with 1 in place "
            "of what is the same for all."
        )
    if mask.dtype != torch.bool:
        return mask
    added = torch.zeros(mask.shape, dtype=torch.float32, device=device)
    return added.masked_fill_(~mask.to(device), torch.finfo(torch.float32).min)


def check_length(name: str, tokens: int, limit: int | None, positions: int | None) -> None:
    """Refuse more tokens than the configured limit, or than the model's relative bias is defined for.

    Args:
        name: "source" or "target".
        tokens: their number.
        limit: the setting; None sets none.
        positions: the model's `Architecture.longest_source` or `longest_target`.

    Raises:
        InputError: naming both, and the setting.
    """
    if limit is not None and tokens > limit:
        raise InputError(
            f"got {tokens} {name} tokens; expected at most {limit}, the max_{name}_tokens that this model was loaded "
            "with. Truncate the text, or load the model with a larger limit."
        )
    if positions is not None and tokens > positions:
        raise InputError(
            f"got {tokens} {name} tokens; expected at most {positions}: longer distances have no bucket with this config's "
            "relative_attention_num_buckets and relative_attention_max_distance. Truncate the text."
        )


def as_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype or its name as one of those that precisions exist for.

    Raises:
        InputError: it is another one.
    """
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in PRECISION_OF:
        raise InputError(f"dtype got {dtype!r}; expected torch.float32, torch.float16 or torch.bfloat16.")
    return cast("torch.dtype", dtype)


def as_device(name: str, device: Any) -> str | None:
    """A device as text, such as "cuda:0"; None stays None.

    Args:
        name: of the argument, for messages.
        device: text, a torch.device or the number of a GPU.

    Raises:
        InputError: it is none of these, or neither a CPU nor an NVIDIA GPU.
    """
    if device is None:
        return None
    number = isinstance(device, int) and not isinstance(device, bool)
    try:
        found = torch.device(f"cuda:{device}" if number else device)
    except (RuntimeError, TypeError, ValueError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise InputError(
            f"{name} got {device!r}; expected 'cpu' or a GPU such as 'cuda:0': engines run on one of these, with all weights in its "
            "memory."
        )
    return str(found)


def device_of_map(device_map: Any) -> str | None:
    """The one device that a ``device_map`` stands for, or None where it leaves the choice.

    Raises:
        InputError: it names several, or one that engines do not run on, such as "disk".
    """
    if isinstance(device_map, dict):
        places = set(map(str, device_map.values()))
        if len(places) != 1:
            raise InputError(
                f"device_map got {device_map!r}; an engine runs on one device. Use device='cuda:0' or 'cpu'."
            )
        device_map = next(iter(device_map.values()))
    choices = (None, "auto", "balanced", "balanced_low_0", "sequential")
    return None if device_map in choices else as_device("device_map", device_map)
