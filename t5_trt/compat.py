"""Differences between the supported versions of Transformers, all in this file.

| Transformers | name of the cache | old names, accepted with a warning |
|---|---|---|
| 5.17 to 5.23 | ``past_key_values`` | |
| 5.24 and newer | ``cache`` | ``past_key_values``; by ``generate`` ``cache_params`` too |

The name is used for an argument of ``forward`` and ``generate``, in the model kwargs inside ``generate`` and for a field of the
outputs. Our own code says ``cache`` and uses `CACHE` where Transformers or its user reads or writes the name. The name is read from
the Hugging Face classes, not from a version number. No request runs through this file.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from transformers import GenerationMixin, T5ForConditionalGeneration
from transformers.utils.deprecation import deprecate_kwarg

F = TypeVar("F", bound=Callable[..., Any])

#: name of the cache in the installed Transformers
CACHE = "cache" if "cache" in inspect.signature(T5ForConditionalGeneration.forward).parameters else "past_key_values"


def takes_old_cache_names(**removed_in: str) -> Callable[[F], F]:
    """Make a function accept the old names of the cache with the warning of Hugging Face's function, if that one does.

    Args:
        removed_in: old name -> version of Transformers in which Hugging Face's function stops accepting it.
    """

    def decorate(function: F) -> F:
        if CACHE == "cache":
            for name, version in reversed(
                removed_in.items()
            ):  # the first becomes the outermost, as in the Hugging Face class
                function = deprecate_kwarg(name, version, new_name=CACHE)(function)
        return function

    return decorate


def names_cache_as_hugging_face(function: F) -> F:
    """Rename a function's parameter `cache` to `CACHE`, for callers and in its signature.

    ``generate`` and ``Trainer`` read signatures to tell arguments from typos; it is kept, as ``generate`` reads it six times a call.
    """
    signature = inspect.signature(function)
    if CACHE == "cache":
        cast("Any", function).__signature__ = signature
        return function

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("cache", None)  # an unknown name here: the Hugging Face class ignores it too
        if CACHE in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE)
        return function(*args, **kwargs)

    parameters = [p.replace(name=CACHE) if name == "cache" else p for name, p in signature.parameters.items()]
    cast("Any", renamed).__signature__ = signature.replace(parameters=parameters)
    return cast("F", renamed)


@functools.cache
def orders_drawn_beams() -> bool:
    """Whether Hugging Face's beam search sorts drawn continuations, best first (5.24 and newer).

    Only the first ones can end a row, so the order affects results. A draw of all of 64 tokens shows it: unsorted draws are in order
    once in 64! times. The random state is restored.
    """
    tokens = 64
    with torch.random.fork_rng(devices=[]):
        scores, *_ = GenerationMixin()._get_top_k_continuations(
            accumulated_log_probs=torch.linspace(0.0, -1.0, tokens)[None],
            running_sequences=torch.zeros((1, 1, 2), dtype=torch.int64),
            running_beam_indices=torch.zeros((1, 1, 1), dtype=torch.int32),
            cur_len=1,
            decoder_prompt_len=1,
            do_sample=True,
            beams_to_keep=tokens,
            num_beams=1,
            vocab_size=tokens,
            batch_size=1,
        )
    return bool((scores.diff() <= 0).all())
