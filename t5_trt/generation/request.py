"""Which requests the device loop serves, as one table; all others run in Transformers' own loop over our forward pass.

| part of a request | device loop | captured with the step |
|---|---|---|
| greedy, sampling, beam search, beam sampling | yes | yes |
| processors in `t5_trt.generation.processor_forms.CAPTURABLE` | yes | yes |
| any other processor (custom, prefix constraints, watermark, ...) | yes | no: called after each step |
| criteria: length, end tokens, time, `StepCheck` | yes | yes |
| any other criterion (custom, stop strings) | yes | no: called after each step |
| output_scores, output_logits | yes | no: copied after each step |
| streamers, decoder prompts, several end tokens, num_return_sequences | yes | yes |
| what `REFUSALS` lists | no | |
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

from t5_trt.compat import CACHE
from t5_trt.generation.cached_property import cached_property
from t5_trt.generation.kv_cache import EngineCache
from t5_trt.generation.processors import fingerprint, is_capturable


@dataclass(frozen=True)
class GenerationPath:
    """How the last ``generate()`` ran.

    Attributes:
        loop: "device", "transformers" or "reference" (the Hugging Face model).
        reason: why not "device"; empty if it was.
    """

    loop: str
    reason: str = ""

    def __str__(self) -> str:
        return self.loop + (f" ({self.reason})" if self.reason else "")


class StepCheck(stopping_criteria.StoppingCriteria):  # type: ignore[misc]
    """Called before every step to end the whole call by an error. It reads no tokens and ends no row.

    Steps run ahead of it and are captured, and a preparation is kept, as if the call had no such criterion.

    Args:
        check: raises the error.
        ended: called when sources are left out of the steps that follow, because they have ended, with their places in the batch and their
            results, int64 [sources * results, tokens]; the call returns them, too. None is not called.
    """

    def __init__(
        self, check: Callable[[], None], ended: Callable[[list[int], torch.Tensor], None] | None = None
    ) -> None:
        self.check, self.ended = check, ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """In Transformers' loop: check, and end none of the rows of `input_ids`."""
        self.check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Request:
    """The arguments of ``GenerationMixin._sample`` and ``_beam_search``.

    Attributes:
        prompt: int64 [R, tokens].
        processors: of the logits, in order.
        criteria: all that can end a row.
        config: the ``GenerationConfig``.
        model_kwargs: of the forward pass.
        streamer: takes tokens as they are made.
        synced_gpus: other processes synchronize with this one in every step.
    """

    prompt: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: Any
    model_kwargs: dict[str, Any]
    streamer: Any = None
    synced_gpus: bool = False

    @property
    def cache(self) -> Any:
        """The caller's cache; None if there is none."""
        return self.model_kwargs.get(CACHE)

    def for_inputs(self, model_kwargs: dict[str, Any], checks: Sequence[StepCheck] = ()) -> Request:
        """This request for other inputs, with these checks in place of its own; cached properties are kept."""
        other = copy.copy(self)
        other.__dict__["model_kwargs"] = model_kwargs
        others = [criterion for criterion in self.criteria if type(criterion) is not StepCheck]
        other.__dict__["criteria"] = StoppingCriteriaList([*others, *checks])
        return other

    @cached_property
    def limit(self) -> int | None:
        """Length in tokens at which every row ends."""
        limits = [c.max_length for c in self.criteria if type(c) is stopping_criteria.MaxLengthCriteria]
        return None if not limits else math.ceil(min(limits))  # Transformers accepts fractions

    @property
    def deadline(self) -> float | None:
        """``time.time()`` at which every row ends."""
        times = [c for c in self.criteria if type(c) is stopping_criteria.MaxTimeCriteria]
        return min((c.initial_timestamp + c.max_time for c in times), default=None)

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a row."""
        ends = [c for c in self.criteria if type(c) is stopping_criteria.EosTokenCriteria]
        return tuple(dict.fromkeys(int(token) for c in ends for token in c.eos_token_id.flatten().tolist()))

    @cached_property
    def fingerprints(self) -> tuple[Hashable, ...]:
        """Fingerprints of the processors, all of which are capturable."""
        return tuple(map(fingerprint, self.processors))

    @cached_property
    def pad(self) -> int | None:
        """Token id that pads rows after their end; None where Transformers continues to write tokens."""
        if not any(hasattr(c, "eos_token_id") for c in self.criteria):
            return None
        return int(self.config._pad_token_tensor)

    @cached_property
    def beam_fill(self) -> int:
        """Token id behind the end of a beam: the padding, or an end token if that is 0 or None, as in Transformers' loop; -1 without any."""
        ends, pad = self.config._eos_token_tensor, self.config._pad_token_tensor
        if ends is None:
            return -1
        return int(pad) if pad is not None and int(pad) else int(ends[0])

    @property
    def checks(self) -> list[StepCheck]:
        """What may end the call between two steps."""
        return [c for c in self.criteria if type(c) is StepCheck]

    @property
    def custom_criteria(self) -> list[Any]:
        """Criteria that must be called after every step."""
        return [c for c in self.criteria if type(c) not in _CRITERIA]

    @property
    def wants_scores(self) -> bool:
        """Whether processed scores are returned."""
        return bool(self.config.return_dict_in_generate and self.config.output_scores)

    @property
    def wants_logits(self) -> bool:
        """Whether unprocessed logits are returned."""
        return bool(self.config.return_dict_in_generate and self.config.output_logits)

    @property
    def known_processors(self) -> bool:
        """Whether all processors are capturable."""
        return all(is_capturable(processor) for processor in self.processors)

    @property
    def capturable(self) -> bool:
        """Whether the token selection can be one CUDA graph with the step; see the table above."""
        return self.known_processors and not (self.custom_criteria or self.wants_scores or self.wants_logits)


_CRITERIA = (
    stopping_criteria.MaxLengthCriteria,
    stopping_criteria.MaxTimeCriteria,
    stopping_criteria.EosTokenCriteria,
    StepCheck,
)


def _hides_decoder_tokens(request: Request) -> bool:
    mask = request.model_kwargs.get("decoder_attention_mask")
    if mask is None:
        return False
    mask = torch.as_tensor(mask)  # the mask of labels is longer than the prompt; a shorter one hides the rest
    return mask.shape[-1] < request.prompt.shape[1] or not bool((mask[..., : request.limit] != 0).all())


def _cache_in_use(request: Request) -> bool:
    return not isinstance(request.cache, EngineCache) or request.cache.state is not None


def _calls_the_model(request: Request) -> bool:
    return any(isinstance(p, logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in request.processors)


def _masks_of_more_axes(request: Request) -> bool:
    masks = (request.model_kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    return any(mask is not None and torch.as_tensor(mask).dim() > 2 for mask in masks)


#: reason -> whether it keeps a request out of the device loop
REFUSALS: dict[str, Callable[[Request], bool]] = {
    "synced_gpus": lambda request: request.synced_gpus,
    "use_cache=False": lambda request: not request.model_kwargs.get("use_cache", True),
    "a cache from an earlier call": _cache_in_use,
    "an attention mask of more than two axes": _masks_of_more_axes,
    "a decoder_attention_mask that hides tokens": _hides_decoder_tokens,
    "decoder_inputs_embeds": lambda request: request.model_kwargs.get("decoder_inputs_embeds") is not None,
    "guidance_scale": _calls_the_model,
    "this model is the assistant": lambda request: bool(getattr(request.config, "is_assistant", False)),
    "no maximum length": lambda request: request.limit is None,
    "low_memory": lambda request: bool(getattr(request.config, "low_memory", False)),
}


def refusal(request: Request) -> str | None:
    """Why a request needs Transformers' loop, or None if the device loop serves it."""
    return next((reason for reason, applies in REFUSALS.items() if applies(request)), None)
