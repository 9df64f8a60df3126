"""Detects that a model's weights have changed since its engines were opened."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Hashable
from functools import cache
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from t5_trt.modeling.adapter_layers import adapter_layers, held_adapters, settings

_address, _version = torch.Tensor.data_ptr, attrgetter("_version")
_watches: weakref.WeakSet[WeightWatch] = weakref.WeakSet()


class WeightWatch:
    """A snapshot of a model's modules and parameters, used to detect changes.

    A comparison takes 0.13 ms for the 260 tensors of T5-base (Intel Xeon). torch's version counters detect in-place operations,
    and a hook detects optimizer steps, because fused optimizers do not increment versions. Other writes through ``parameter.data`` go unnoticed.

    Args:
        model: any module.
        modules: the modules to track; None tracks all of them and the settings of their adapters.

    Attributes:
        stepped: an optimizer has changed some of the parameters.
    """

    def __init__(self, model: nn.Module, modules: Collection[nn.Module] | None = None) -> None:
        self._adapters = list(adapter_layers(model).values()) if modules is None else []
        modules = list(model.modules()) if modules is None else modules
        owned = [(owner._modules, *entry) for owner in modules for entry in owner._modules.items()]
        parameters = [
            (owner._parameters, *entry)
            for owner in modules
            for entry in owner._parameters.items()
            if entry[1] is not None
        ]
        self._tensors: list[Any] = [tensor for _, _, tensor in parameters]
        # in columns, because they are compared before every call
        self._owners, self._names, self._parts = zip(*owned, *parameters, strict=True)
        self._counting = [
            tensor for tensor in self._tensors if not tensor.is_inference()
        ]  # inference tensors have no versions
        self._state = self._look()
        self._settings = list(map(settings, self._adapters))
        self._ids = set(map(id, self._tensors))
        self.stepped = False
        _listen()
        _watches.add(self)

    def renewed(self) -> WeightWatch | None:
        """A new snapshot of the same modules and parameters; None if adapters have added others."""
        made = copy.copy(self)
        made._state, made._settings, made.stepped = self._look(), list(map(settings, self._adapters)), False
        _watches.add(made)
        same = [
            held_adapters(one) == held_adapters(other)
            for one, other in zip(made._settings, self._settings, strict=True)
        ]
        return made if all(same) else None

    @property
    def state(self) -> Hashable:
        """A value that is equal for equal weights, as far as torch counts changes."""
        return tuple(map(tuple, self._state)), tuple(self._settings)

    def after_step(self, optimizer: Any) -> None:
        """Record an optimizer step."""
        self.stepped |= any(id(tensor) in self._ids for group in optimizer.param_groups for tensor in group["params"])

    def replaced(self) -> bool:
        """Whether modules or parameters were replaced."""
        return not all(map(is_, map(dict.get, self._owners, self._names), self._parts))

    def changed(self) -> bool:
        """Whether weights have other values or addresses."""
        if self.stepped or self.replaced() or self._look() != self._state:
            return True
        return bool(self._adapters) and list(map(settings, self._adapters)) != self._settings

    def _look(self) -> tuple[list[int], list[int]]:
        """Addresses and versions."""
        return list(map(_address, self._tensors)), list(map(_version, self._counting))


@cache
def _listen() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    for watch in list(_watches):
        watch.after_step(optimizer)
