"""Caches the preparation of ``generate()`` across calls that differ only in the source's tokens.

Before the loop ``generate`` copies and merges settings, looks for typos in the names of arguments, and makes processors and criteria: half a
millisecond on a fast host, two on a slow one, during which the GPU is idle. None of it depends on the source's tokens.

    key = request_key(inputs, kwargs)         None: this call is always prepared
    prepared = requests.find(key, ...)        drops everything if the model's settings or Transformers' code have changed
    requests.keep(key, loop, request, ...)    after a call that was prepared, unless the preparation belongs to that call alone
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
from transformers import GenerationConfig

from t5_trt.generation.request import Request, StepCheck

#: number of prepared requests that are kept, least recently used first out
KEPT = 64
#: arguments with numeric values: all settings except the one whose meaning changes with every call
_NAMES = frozenset(vars(GenerationConfig())) - {"max_time"}
_TENSORS = ("input_ids", "attention_mask")
_CRITERIA = "stopping_criteria"


@dataclass(frozen=True)
class Prepared:
    """The preparation of one request, for others with its key.

    Attributes:
        loop: the decode loop that ran it.
        request: with a prompt that ``generate`` made.
        expand: prompt rows for each source row.
    """

    loop: Any
    request: Request
    expand: int


class RequestKey(NamedTuple):
    """Equal for calls that can share a preparation: rows and device of the source, and all other arguments with their types."""

    rows: int
    device: str
    arguments: tuple[tuple[str, type, Any], ...]


def request_key(inputs: Any, kwargs: Mapping[str, Any]) -> RequestKey | None:
    """A key that is equal for calls of ``generate`` that differ only in the source's tokens and length; None if the call must be prepared.

    Args:
        inputs: the first argument.
        kwargs: the others; besides ids, mask and checks between steps, settings that are numbers, bools or None.
    """
    ids, mask = (kwargs.get(name) for name in _TENSORS)
    if inputs is not None and ids is not None:
        return None
    ids = inputs if ids is None else ids
    if not (_is_ids(ids) and _is_ids(mask) and mask.shape == ids.shape):
        return None
    left_out = _TENSORS if step_checks(kwargs) is None else (*_TENSORS, _CRITERIA)
    plain = [(name, type(value), value) for name, value in kwargs.items() if name not in left_out]
    if not all(name in _NAMES and kind in (bool, int, float, type(None)) for name, kind, _ in plain):
        return None
    return RequestKey(len(ids), str(ids.device), tuple(sorted(plain, key=lambda entry: entry[0])))


def step_checks(kwargs: Mapping[str, Any]) -> list[StepCheck] | None:
    """The criteria of a call of ``generate``, if all of them are checks between steps; otherwise None."""
    criteria = kwargs.get(_CRITERIA)
    if criteria is None:
        return []
    known = isinstance(criteria, list) and all(type(criterion) is StepCheck for criterion in criteria)
    return list(criteria) if known else None


def _is_ids(tensor: Any) -> TypeGuard[torch.Tensor]:
    return type(tensor) is torch.Tensor and tensor.dim() == 2 and tensor.dtype == torch.int64


class SettingsSnapshot:
    """A snapshot of the attributes that preparation reads, and of the code that it runs.

    Args:
        objects: have their attributes in ``__dict__``.
        code: functions, compared by identity.
    """

    def __init__(self, objects: tuple[Any, ...], code: tuple[Any, ...]) -> None:
        self._code = code
        try:
            self._kinds = [_kinds(each) for each in objects]
            self._values: list[Any] | None = [_plain_copy(vars(each)) for each in objects]
        except TypeError:
            self._values = None  # a tensor or another value whose changes cannot be detected

    @property
    def comparable(self) -> bool:
        """Whether all attributes can be compared."""
        return self._values is not None

    def same(self, objects: tuple[Any, ...], code: tuple[Any, ...]) -> bool:
        """Whether two snapshots are equal, including the types of the attributes."""
        try:
            return (
                self._values is not None
                and code == self._code
                and [_kinds(each) for each in objects] == self._kinds
                and [vars(each) for each in objects] == self._values
            )
        except (
            TypeError,
            ValueError,
            RuntimeError,
        ):  # no attributes, or values such as tensors that cannot be compared
            return False


def _kinds(value: Any) -> list[type]:
    return [type(value), *map(type, vars(value).values())]


def _plain_copy(value: Any) -> Any:
    """A copy of numbers, strings and containers of them.

    Raises:
        TypeError: it contains something else.
    """
    if type(value) is dict:
        return {name: _plain_copy(entry) for name, entry in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(_plain_copy, value))
    if value is None or type(value) in (bool, int, float, str, torch.dtype):
        return value
    raise TypeError(f"{type(value)} is not plain")


class PreparedRequests:
    """The prepared requests of one model, valid while its settings are unchanged. Not thread-safe."""

    def __init__(self) -> None:
        self._kept: OrderedDict[RequestKey, Prepared] = OrderedDict()
        self._settings = SettingsSnapshot((), ())

    def find(self, key: RequestKey | None, objects: tuple[Any, ...], code: tuple[Any, ...]) -> Prepared | None:
        """The preparation stored under a key, if settings and code are unchanged.

        Args:
            key: None finds nothing.
            objects: as of `SettingsSnapshot`.
            code: as of `SettingsSnapshot`.
        """
        if key is None:
            return None
        if not self._settings.same(objects, code):
            self._kept.clear()
            self._settings = SettingsSnapshot(objects, code)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(
        self, key: RequestKey | None, loop: Any, request: Request, objects: tuple[Any, ...], code: tuple[Any, ...]
    ) -> None:
        """Store a preparation, unless it contains code or a deadline of its call, or settings have changed meanwhile.

        Args:
            key: None keeps nothing.
            loop: the decode loop that ran the request.
            request: as Transformers prepared it.
            objects: as of `SettingsSnapshot`.
            code: as of `SettingsSnapshot`.
        """
        own = request.streamer is not None or request.deadline is not None or not request.capturable
        if key is None or own or request.config.return_dict_in_generate or request.prompt.shape[1] != 1:
            return
        if not self._settings.same(objects, code):
            return
        self._kept[key] = Prepared(loop, request.for_inputs({}), len(request.prompt) // key.rows)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
