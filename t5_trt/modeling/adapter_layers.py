"""peft layers in a model: where they are, which of their adapters are active, and the effective weight of each.

A peft layer replaces a linear layer, an embedding or a norm, which it keeps as its base layer. This module never imports peft first: a model
can have such layers only if somebody else has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from t5_trt.errors import UnsupportedModelError

#: (B [outputs, r], A [r, inputs], scale) of each adapter
LowRank = list[tuple[torch.Tensor, torch.Tensor, float]]
#: kinds of peft layers whose merged weight gives the result of their forward pass (tested)
_checked: set[tuple[Any, ...]] = set()


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """The outermost peft layers of a model by name."""
    kinds = _kinds()
    return dict(_walk(model, "", kinds)) if kinds else {}


def base_layer(layer: Any) -> Any:
    """The base layer of a peft layer; any other module itself."""
    kinds = _kinds()
    while kinds and isinstance(layer, kinds):
        layer = layer.base_layer if isinstance(layer, kinds[0]) else layer.original_module
    return layer


def settings(layer: Any) -> tuple[Any, ...]:
    """Which of a layer's adapters are active and their scales; it changes when another adapter is made active."""
    modules = layer._modules
    held = tuple(len(modules[name]) for name in layer.adapter_layer_names if name in modules)
    scaling = layer.__dict__.get("scaling")
    scales = tuple(scaling.values()) if scaling else ()
    merged = tuple(layer.merged_adapters)
    return (layer._disable_adapters, tuple(layer.active_adapters), merged, held, scales)


def held_adapters(found: tuple[Any, ...]) -> Any:
    """The scales in a layer's `settings`."""
    return found[3]


def has_own_rows(layers: dict[str, Any]) -> bool:
    """Whether each row of the batch chooses its adapter (peft's ``adapter_names``, which hooks pass to the layers)."""
    return any(layer._forward_pre_hooks for layer in layers.values())


def settle(layers: dict[str, Any]) -> None:
    """Unmerge adapters that were merged and then disabled, as the forward pass of peft layers does."""
    for layer in layers.values():
        if layer.disable_adapters and layer.merged_adapters:
            layer.unmerge()


@torch.no_grad()
def effective_weight(name: str, layer: Any, base: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The effective weight of a peft layer in its present state.

    Args:
        name: of the layer, for errors.
        layer: a peft layer.
        base: the weight of its base layer, float32, on the device that computes.
        out: scratch like `base`, which may be overwritten.

    Returns:
        float32, like `base`; it may be `base` or `out` itself.

    Raises:
        UnsupportedModelError: an active adapter cannot be expressed as another weight.
    """
    tuner, _ = _kinds()
    if not isinstance(layer, tuner):
        return _replaced_weight(name, layer, base, out)
    if "forward" in layer.__dict__:
        raise UnsupportedModelError(_refusal(name, layer, "its forward pass was exchanged"))
    if isinstance(layer.base_layer, tuner):
        base = effective_weight(name, layer.base_layer, base)
    active = _active(layer)
    if not active:
        return base
    factors = _low_rank_factors(layer, active)
    if factors is None:
        return _merged_copy(name, layer, base, active)
    factors = [
        (up.detach().to(base.device, torch.float32), down.detach().to(base.device, torch.float32), scale)
        for up, down, scale in factors
    ]
    return add_low_rank(base, factors, out)


def low_rank_update(layer: Any) -> LowRank | None:
    """The update that a layer's active adapters make, as `add_low_rank` takes it; None where it is something else or cannot be told."""
    tuner = _kinds()[0]
    if not isinstance(layer, tuner) or "forward" in layer.__dict__ or isinstance(layer.base_layer, tuner):
        return None
    active = _active(layer)
    return _low_rank_factors(layer, active) if active else []


def add_low_rank(base: torch.Tensor, factors: LowRank, out: torch.Tensor | None = None) -> torch.Tensor:
    """A weight and the update of some adapters.

    Args:
        base: float32 [outputs, inputs].
        factors: of each adapter, float32 where `base` is.
        out: see `effective_weight`.
    """
    made = base
    for up, down, scale in factors:
        made = torch.addmm(made, up, down, alpha=scale, out=out)
    return made


def _active(layer: Any) -> list[str]:
    """The adapters that a layer applies."""
    if layer.disable_adapters or layer.merged:
        return []
    return [adapter for adapter in layer.active_adapters if _holds(layer, adapter)]


def _kinds() -> tuple[Any, ...]:
    """Classes of peft layers that change a base layer's result, and of wrappers that replace it; empty if peft is not imported."""
    return _kinds_of_peft() if "peft" in sys.modules else ()


@cache
def _kinds_of_peft() -> tuple[Any, ...]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def _walk(module: nn.Module, prefix: str, kinds: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for name, child in module._modules.items():
        if isinstance(child, kinds):
            yield prefix + name, child
        elif child is not None:
            yield from _walk(child, f"{prefix}{name}.", kinds)


def _holds(layer: Any, adapter: str) -> bool:
    """Whether a layer has weights of an adapter."""
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


def _replaced_weight(name: str, wrapper: Any, base: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """The weight of ``modules_to_save`` or ``trainable_token_indices``."""
    active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper._adapters]
    if wrapper.disable_adapters or len(active) < len(wrapper.active_adapters) or not active:
        return base
    if "token_adapter" in wrapper._modules:
        return effective_weight(name, wrapper.token_adapter, base, out)
    module = wrapper.modules_to_save[active[0]]
    if isinstance(module, _kinds()):
        weight = base_layer(module).weight.detach().to(base.device, torch.float32)
        return effective_weight(name, module, weight, out)
    found: torch.Tensor = module.weight.detach().to(base.device, torch.float32)
    return found


def _low_rank_factors(layer: Any, active: list[str]) -> LowRank | None:
    """(B [outputs, r], A [r, inputs], scale) of each adapter of a linear layer with plain LoRA or rsLoRA; None for others."""
    if type(layer) is not _lora_linear() or layer.fan_in_fan_out or any(name in layer.lora_variant for name in active):
        return None
    pairs: Any = [(layer.lora_B[name], layer.lora_A[name], float(layer.scaling[name])) for name in active]
    if any(up.bias is not None for up, _, _ in pairs):
        return None
    return [(up.weight, down.weight, scale) for up, down, scale in pairs]


@cache
def _lora_linear() -> Any:
    from peft.tuners.lora.layer import Linear

    return Linear


def _merged_copy(name: str, layer: Any, base: torch.Tensor, active: list[str]) -> torch.Tensor:
    """The weight that peft's own merge makes of copies."""
    twin = _twin(layer, base, active)
    try:
        twin.merge(adapter_names=active)
    except Exception as error:  # peft raises several kinds
        raise UnsupportedModelError(_refusal(name, layer, f"peft cannot merge it ({error})")) from error
    merged = twin.get_base_layer()
    if getattr(merged, "bias", None) is not None or merged.weight.shape != base.shape:
        raise UnsupportedModelError(_refusal(name, layer, "it adds a bias or changes the shape"))
    kind = (type(layer), *(type(getattr(layer, "lora_variant", {}).get(adapter)) for adapter in active))
    if kind not in _checked:
        _check_merge(name, layer, merged, _twin(layer, base, active))
        _checked.add(kind)
    weight: torch.Tensor = merged.weight.detach().float()
    return weight


def _check_merge(name: str, layer: Any, merged: nn.Module, unmerged: nn.Module) -> None:
    """Refuse a layer whose forward pass is not its base layer's with another weight."""
    weight: Any = merged.weight
    generator = torch.Generator().manual_seed(0)
    if isinstance(merged, nn.Embedding):
        source = torch.randint(len(weight), (1, 8), generator=generator)
    else:
        source = torch.randn((1, 8, weight.shape[-1]), generator=generator)
    source = source.to(weight.device)
    wanted, found = unmerged(source), merged(source)
    if wanted.shape != found.shape or not torch.allclose(
        wanted, found, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())
    ):
        raise UnsupportedModelError(_refusal(name, layer, "its forward pass is not a product with one matrix"))


def _twin(layer: Any, base: torch.Tensor, active: list[str]) -> Any:
    """A copy of a peft layer in evaluation mode, with some of its adapters, over a copy of a weight.

    Other tensors on the device of `base` are shared; all containers are copies.
    """
    twin = _shallow(layer, base.device, {*active})
    inner = _shallow(base_layer(layer), base.device, None)
    inner._parameters["weight"] = nn.Parameter(base.clone(), requires_grad=False)
    twin._modules["base_layer"] = inner
    return twin.eval()


def _shallow(module: Any, device: torch.device, kept: set[str] | None) -> Any:
    """A copy of a module and its children over the same tensors, or over copies on another device.

    Args:
        module: any.
        device: of the tensors.
        kept: names of the adapters to keep of those in the module's dictionaries; None for all.
    """
    made = object.__new__(type(module))
    made.__dict__ = {k: v.copy() if type(v) in (dict, list, set) else v for k, v in module.__dict__.items()}
    made._parameters, made._modules = dict(module._parameters), dict(module._modules)
    if kept is not None:
        for name in {*module.adapter_layer_names, *module.other_param_names} & module._modules.keys():
            made._modules[name] = _only(module._modules[name], kept)
    for name, parameter in module._parameters.items():
        moved = parameter if parameter is None or parameter.device == device else parameter.detach().to(device)
        made._parameters[name] = moved if moved is None or moved is parameter else nn.Parameter(moved, False)
    made._buffers = {k: v if v is None else v.to(device) for k, v in module._buffers.items()}
    made._modules = {
        name: child if child is None or name == "base_layer" else _shallow(child, device, None)
        for name, child in made._modules.items()
    }
    return made


def _only(held: Any, kept: set[str]) -> Any:
    """A module's dictionary of adapters, reduced to the wanted ones."""
    if not hasattr(held, "keys"):
        return held
    made = type(held)() if not isinstance(held, nn.ParameterDict) else nn.ParameterDict()
    for name in held.keys() & kept:
        made[name] = held[name]
    return made


def _refusal(name: str, layer: Any, why: str) -> str:
    kind = type(layer)
    return (
        f"{name} got {kind.__module__}.{kind.__qualname__} with adapter {', '.join(layer.active_adapters)}: {why}. Engines run adapters "
        "that amount to other weights, such as LoRA, DoRA and (IA)^3. Use the Hugging Face class for this one."
    )
