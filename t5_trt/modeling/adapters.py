"""Effective weights of a model with peft adapters, and how an open session is updated when they change.

    parameters ──> base weight of each adapted layer ─┐
                                                      ├─> effective weight ──> engines, kernels
    peft's layers ──> update of the active adapters ──┘

All other weights are the parameters themselves. On a CPU an effective weight has memory of its own, which ONNX Runtime reads and a change
overwrites. On a GPU it is computed there, from a copy of the base weight, and written where engines and kernels read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from t5_trt.errors import UnsupportedModelError
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.parameters import EMBEDDING, in_float32_on
from t5_trt.modeling.adapter_factors import DeviceFactors
from t5_trt.modeling.adapter_layers import adapter_layers, add_low_rank, base_layer, effective_weight, settle
from t5_trt.modeling.weight_tracker import WeightWatch
from t5_trt.runtime.weight_updates import ComputedFrom

#: the embeddings of the stacks
_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
#: fp16 factors are kept for this many states of the adapters
_SCALINGS_KEPT = 64


class AdaptedWeights(Mapping[str, torch.Tensor]):
    """State-dict key -> tensor of a model with adapters, as after merging them.

    Args:
        model: on engines.

    Attributes:
        layers: of peft, by name.
        base: the same without adapters.
        changing: keys of the adapted weights.

    Raises:
        UnsupportedModelError: an adapted layer is not a linear layer, an embedding or a norm.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = adapter_layers(model)
        settle(self.layers)
        self.base = _base_weights(model, self.layers)
        self._adapted = _adapted_keys(self.layers)
        self.changing = frozenset(self._adapted)
        self._watch = WeightWatch(model, _outside(model, self.layers))
        self._bases = {name: base_layer(layer).weight for name, layer in self.layers.items()}
        self._merged = self._merged_adapters()
        self._own: dict[str, torch.Tensor] = {}
        self._on_device: dict[str, torch.Tensor] = {}
        self._scalings: dict[Hashable, Fp16Scaling] = {}
        self._factors = DeviceFactors(self._adapted)

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._adapted:
            return self.base[key]
        return self._own[key] if key in self._own else self._computed(key, self.base[key].detach().float())

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def keep(self) -> None:
        """Allocate memory for the adapted weights, float32, whose addresses do not change."""
        for key in self._adapted:
            self._own.setdefault(key, torch.empty(self.base[key].shape))
        self._write()

    def check(self) -> None:
        """Refuse adapters that give the two stacks different embeddings.

        Raises:
            UnsupportedModelError: they do.
        """
        tables = [key for key in _TABLES if key in self.base]
        if not self.changing.isdisjoint(tables) and not torch.equal(self[tables[0]], self[tables[-1]]):
            raise UnsupportedModelError(
                "encoder.embed_tokens and decoder.embed_tokens got adapters that make different embeddings of them; expected one for "
                "both: engines look tokens up in a single one. Use the Hugging Face class for this adapter."
            )

    def base_changed(self) -> bool:
        """Whether anything but adapters has changed."""
        settle(self.layers)
        same = all(base_layer(layer).weight is self._bases[name] for name, layer in self.layers.items())
        return not same or self._merged_adapters() != self._merged or self._watch.changed()

    def follow(self, device: torch.device) -> Mapping[str, torch.Tensor]:
        """The adapted weights as they are now, on a device: for `t5_trt.runtime.session.Session.update_weights`."""
        self._write()
        self.check()
        return _OnDevice(self, device, self.changing)

    def on(self, device: torch.device) -> Mapping[str, torch.Tensor]:
        """All weights on a device, each put there when it is asked for."""
        return _OnDevice(self, device, self.base.keys())

    def fp16_scaling(self, state: Hashable, choose: Callable[[], Fp16Scaling]) -> Fp16Scaling:
        """The fp16 factors of a state of the weights, chosen once for each.

        Args:
            state: of `WeightWatch`.
            choose: called where the state is a new one.
        """
        if state not in self._scalings:
            if len(self._scalings) >= _SCALINGS_KEPT:
                self._scalings.clear()
            self._scalings[state] = choose()
        return self._scalings[state]

    def forget_scalings(self) -> None:
        """Treat all weights as changed, after an optimizer step: fused optimizers do not increment tensor versions."""
        self._scalings.clear()
        self._factors.forget()

    def computed_on(self, device: torch.device, key: str) -> torch.Tensor:
        """The effective weight for a key on a device; float32 if adapters change it."""
        if key not in self._adapted or key in self._own:
            return self[key].to(device)
        return self._computed(key, self._base_on(device, key))

    def source_on(self, device: torch.device) -> ComputedFrom | None:
        """What the adapted weights are computed from as they are now, in memory of the device that later states use too.

        Returns:
            None where that is not a base weight and low-rank factors for each.
        """
        if self._own or (state := self._factors.load(device)) is None:
            return None
        bases = {key: self._base_on(device, key) for key in self._adapted}
        addresses = tuple(base.data_ptr() for base in bases.values())
        factors = self._factors
        return ComputedFrom(
            (state, addresses), {key: partial(add_low_rank, base, factors[key]) for key, base in bases.items()}
        )

    def _base_on(self, device: torch.device, key: str) -> torch.Tensor:
        """The base weight of an adapted one, float32, copied to the device once."""
        if key not in self._on_device:
            self._on_device[key] = in_float32_on(self.base[key], device)
        return self._on_device[key]

    def _computed(self, key: str, base: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return effective_weight(key.removesuffix(".weight"), self._adapted[key], base, out)

    def _write(self) -> None:
        for key, own in self._own.items():
            made = self._computed(key, self.base[key].detach().float(), own)
            if made is not own:
                own.copy_(made)

    def _merged_adapters(self) -> list[tuple[str, ...]]:
        return [tuple(layer.merged_adapters) for layer in self.layers.values()]


class _OnDevice(Mapping[str, torch.Tensor]):
    """Some of `AdaptedWeights` on a device, each computed on access."""

    def __init__(self, weights: AdaptedWeights, device: torch.device, keys: Any) -> None:
        self._weights, self._device, self._keys = weights, device, keys

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._weights.computed_on(self._device, key)

    def source(self) -> ComputedFrom | None:
        """See `t5_trt.runtime.weight_updates.ComputedWeights`."""
        return self._weights.source_on(self._device) if self._keys == self._weights.changing else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def base_weights(model: nn.Module) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """State-dict key -> tensor of a model without its adapters, and the keys that adapters change.

    Raises:
        UnsupportedModelError: an adapted layer is not a linear layer, an embedding or a norm.
    """
    layers = adapter_layers(model)
    return _base_weights(model, layers), frozenset(_adapted_keys(layers))


def _adapted_keys(layers: dict[str, Any]) -> dict[str, Any]:
    """Adapted layers by the keys of their effective weights."""
    found = {f"{name}.weight": layer for name, layer in layers.items()}
    found.pop(EMBEDDING, None)  # the stacks look tokens up in embeddings of their own
    if _TABLES[0] in found:
        found[EMBEDDING] = found[_TABLES[0]]
    return found


def _base_weights(model: nn.Module, layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    if not layers:
        return model.state_dict()
    inside = tuple(f"{name}." for name in layers)
    found = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(inside)}
    for name, layer in layers.items():
        base = base_layer(layer)
        if any(True for _ in base.children()):
            raise UnsupportedModelError(
                f"{name} got an adapter ({type(layer).__name__}) around {type(base).__name__}, which has modules inside; expected "
                "adapters of linear layers, embeddings and norms. Use the Hugging Face class for this one."
            )
        found.update({f"{name}.{key}": tensor.detach() for key, tensor in base.named_parameters()})
    return found


def _outside(model: nn.Module, layers: dict[str, Any]) -> list[nn.Module]:
    """The modules of a model without those that belong to adapters; base layers are included."""
    inner = {id(module) for layer in layers.values() for module in layer.modules()}
    bases = [base_layer(layer) for layer in layers.values()]
    return [module for module in model.modules() if id(module) not in inner] + bases
