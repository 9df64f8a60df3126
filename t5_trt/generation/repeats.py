"""Requests like an earlier one: what Transformers prepared for that one is used again.

Before the loop ``generate`` copies and merges settings, looks for typos in the names of arguments, and makes processors and criteria: half a
millisecond on a fast host, two on a slow one, in which a GPU has nothing to do. None of it depends on the source's tokens.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch

from t5_trt.generation.support import Request

#: kinds of request that are kept, the ones used last
KEPT = 64
#: arguments that mean something else in every call, or code; and those that change what is returned
_APART = frozenset({"max_time", "custom_generate", "trust_remote_code", "return_dict_in_generate"})
_TENSORS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Prepared:
    """What a request left for those like it.

    Attributes:
        loop: the decode loop that ran it.
        request: with a prompt that was made for it, not given.
        expand: rows of the prompt for each row of the source.
    """

    loop: Any
    request: Request
    expand: int


class Likeness(NamedTuple):
    """What calls of one kind have in common: rows of the source, its device, and all other arguments with their types."""

    rows: int
    device: str
    arguments: tuple[tuple[str, type, Any], ...]


def likeness(inputs: Any, kwargs: Mapping[str, Any]) -> Likeness | None:
    """Equal for calls of ``generate`` that differ in the source's tokens and length only; None for calls that are always prepared.

    Args:
        inputs: the first argument.
        kwargs: the others; none but ids and mask may be anything but a number, a bool or None.
    """
    ids, mask = (kwargs.get(name) for name in _TENSORS)
    ids = inputs if ids is None else ids
    if inputs is not None and ids is not inputs:
        return None
    if not (_is_ids(ids) and _is_ids(mask) and mask.shape == ids.shape and _APART.isdisjoint(kwargs)):
        return None
    plain = [(name, type(value), value) for name, value in kwargs.items() if name not in _TENSORS]
    if not all(kind in (bool, int, float, type(None)) for _, kind, _ in plain):
        return None
    return Likeness(len(ids), str(ids.device), tuple(sorted(plain, key=lambda entry: entry[0])))


def _is_ids(tensor: Any) -> TypeGuard[torch.Tensor]:
    return type(tensor) is torch.Tensor and tensor.dim() == 2 and tensor.dtype == torch.int64


class Repeats:
    """The kinds of request that one model had, as long as its settings stay as they are. Not thread-safe."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Likeness, Prepared] = OrderedDict()
        self._settings: list[dict[str, Any]] = []
        self.pending: Likeness | None = None  # the likeness of the call that is being prepared

    def find(self, key: Likeness | None, *settings: Any) -> Prepared | None:
        """What was prepared for a likeness, if these objects are as they were.

        Args:
            key: see `likeness`.
            settings: everything else that preparation reads: the generation config and the model's.
        """
        if key is None:
            return None
        if not self._unchanged(settings):
            self._kept.clear()
            self._settings = [copy.deepcopy(vars(each)) for each in settings]
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, loop: Any, request: Request) -> None:
        """Keep what was prepared for the pending call, if one call's code and clock are not part of it."""
        key = self.pending
        if key is None or request.streamer is not None or request.deadline is not None or not request.recordable:
            return
        if request.config.return_dict_in_generate or request.prompt.shape[1] != 1:
            return
        self._kept[key] = Prepared(loop, request.for_inputs({}), len(request.prompt) // key.rows)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _unchanged(self, settings: tuple[Any, ...]) -> bool:
        try:
            return [vars(each) for each in settings] == self._settings
        except ValueError:  # arrays, which do not tell whether they are equal
            return False
