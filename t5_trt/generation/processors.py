"""Logits processors for the decode loop: capturable forms of Transformers' processors.

A capturable form has fixed shapes and reads the length from a tensor, so that it can be part of a CUDA graph: it neither waits for the
GPU nor reads a value on the host. Each returns exactly the values of the class of the same name in
`transformers.generation.logits_process`. Numbers such as a temperature are read from memory, so that a captured step also serves
requests with other values.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import logits_process

from t5_trt.generation.processor_forms import CAPTURABLE, HIDDEN, Apply, Read, marked
from t5_trt.generation.token_rules import DeviceRules
from t5_trt.runtime.session import Hiding


@dataclass(frozen=True)
class CapturableProcessor:
    """A processor in capturable form.

    Attributes:
        apply: see `Apply`.
        numbers: tensors [] on the device that `apply` reads, and where their values come from.
        hides: tokens, bool [V], and the length [] below which `apply` hides them; None if it does more than that.
    """

    apply: Apply
    numbers: Sequence[tuple[torch.Tensor, Read]]
    hides: tuple[torch.Tensor, torch.Tensor] | None = None

    def load(self, processor: Any) -> None:
        """Load the parameter values of a processor of the same `fingerprint`."""
        for number, read in self.numbers:
            number.fill_(read(processor, number.device).item())


class CapturableProcessors:
    """Processors in capturable form, in order.

    Args:
        forms: see `CapturableProcessor`.
        rules: of the same processors, where kernels do a part of the work.

    Attributes:
        hiding: the effect of all processors, if they only hide the same tokens up to some length; else None.
    """

    def __init__(self, forms: Sequence[CapturableProcessor], rules: DeviceRules | None = None) -> None:
        self._forms, self._rules = forms, rules
        self._loaded: Sequence[Any] | None = None
        hides = [form.hides for form in forms if form.hides is not None]
        self.hiding: Hiding | None = None
        if forms and len(hides) == len(forms) and all(torch.equal(tokens, hides[0][0]) for tokens, _ in hides):
            self.hiding = Hiding(
                hides[0][0].to(torch.uint8), torch.zeros(1, dtype=torch.float64, device=hides[0][0].device)
            )
            self._hidden = hides[0][0].nonzero()[:, 0]
            self._set_hiding()

    def _set_hiding(self) -> None:
        if self.hiding is not None:
            self.hiding.until.copy_(
                torch.stack([form.hides[1] for form in self._forms if form.hides is not None]).amax()
            )

    def __len__(self) -> int:
        """Their number."""
        return len(self._forms)

    def __call__(self, tokens: torch.Tensor, position: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, V] of the token after the one at `position` (int64 [1], or [rows, 1] where rows differ).

        With `rules`, `scores` may be overwritten.
        """
        if self._rules is None:
            return self._apply(self._forms, tokens, position, scores)
        return self._apply(
            self._forms[self._rules.parts[1] :], tokens, position, self._edited(tokens, position, scores)
        )

    def _apply(
        self, forms: Sequence[CapturableProcessor], tokens: torch.Tensor, position: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        if forms:
            length = position + 1
            for form in forms:
                scores = form.apply(tokens, length, scores)
        return scores

    def _edited(self, tokens: torch.Tensor, position: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores after all processors but those that the choice itself includes."""
        assert self._rules is not None
        front, edited = self._rules.parts
        scores = self._apply(self._forms[:front], tokens, position, scores).contiguous()
        if edited > front:
            self._rules.edit(tokens, position, scores)
        return scores

    @property
    def chooses(self) -> bool:
        """Whether `choose` has kernels for it."""
        return self._rules is not None

    def choose(
        self,
        tokens: torch.Tensor,
        position: torch.Tensor,
        logits: torch.Tensor,
        variates: torch.Tensor | None,
        chosen: torch.Tensor,
    ) -> None:
        """Choose the next token of every row by kernels.

        Args:
            tokens: int64 [rows, M].
            position: int64 [1].
            logits: float32 [rows, V], which may be overwritten.
            variates: exponential ones for draws, as of the logits; None takes the best tokens.
            chosen: int64 [rows], gets the tokens.
        """
        assert self._rules is not None
        self._rules.choose(self._edited(tokens, position, logits), variates, chosen)

    def hidden(self, position: torch.Tensor) -> torch.Tensor | None:
        """With `hiding` on a CPU: its tokens, uint8 [V], if they are hidden after the token at `position`; else None."""
        return self.hiding.tokens if self.hiding is not None and self.hiding.holds(int(position) + 1) else None

    def overwrite(self, tokens: torch.Tensor, position: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As a call, but `scores` may be overwritten: on a CPU, hiding tokens then needs no copy of V scores."""
        if self.hiding is None or scores.device.type != "cpu":
            return self(tokens, position, scores)
        if self.hidden(position) is not None:
            scores.index_fill_(1, self._hidden, HIDDEN)
        return scores

    def load(self, processors: Sequence[Any]) -> None:
        """Load new parameter values from processors of the same kinds; no-op if the same list is already loaded."""
        if processors is self._loaded:
            return
        self._loaded = None
        for form, processor in zip(self._forms, processors, strict=True):
            form.load(processor)
        if self._rules is not None:
            self._rules.load(processors)
        self._set_hiding()
        self._loaded = processors


def capturable_processors(
    processors: Sequence[Any], vocab_size: int, capacity: int, device: torch.device
) -> list[CapturableProcessor] | None:
    """Capturable forms of processors, or None if one of them is not in `CAPTURABLE`.

    Args:
        processors: instances of Transformers' classes.
        vocab_size: V.
        capacity: M, the width of the token buffer.
        device: where scores will be.
    """
    if not all(is_capturable(processor) for processor in processors):
        return None
    forms = []
    for processor in processors:
        kind, mine, numbers = CAPTURABLE[type(processor)], copy.copy(processor), []
        for name, read in kind.numbers.items():
            numbers.append((read(processor, device).to(device), read))
            setattr(mine, name, numbers[-1][0])
        hides = None
        if kind.hides_ends_below is not None:
            hides = marked(processor.eos_token_id, vocab_size, device), getattr(mine, kind.hides_ends_below)
        forms.append(CapturableProcessor(kind.make(mine, vocab_size, capacity, device), numbers, hides))
    return forms


def is_capturable(processor: Any) -> bool:
    """Whether a processor can be part of a captured step; subclasses cannot."""
    if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
        return type(processor) in CAPTURABLE and getattr(processor, "prompt_ignore_length", None) is None
    return type(processor) in CAPTURABLE


def fingerprint(processor: Any) -> Hashable:
    """Equal for processors that one capturable form can serve: the class and its settings, except numbers in memory."""
    numbers = CAPTURABLE[type(processor)].numbers
    settings = ((name, _frozen(value)) for name, value in sorted(vars(processor).items()) if name not in numbers)
    return type(processor).__name__, tuple(settings)


def identity(processor: Any) -> Hashable:
    """Equal for processors that do the same: the class and its settings with their types."""
    settings = sorted(vars(processor).items())
    return type(processor), tuple((name, type(value), _frozen(value)) for name, value in settings)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(value.flatten().tolist())
    if isinstance(value, dict):
        return tuple((_frozen(key), _frozen(entry)) for key, entry in value.items())
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list | tuple) else value
