"""Rejects models whose modules compute something else than those of the Hugging Face class, which engines implement."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import dropout

from t5_trt.errors import UnsupportedModelError
from t5_trt.modeling.adapter_layers import base_layer


def check_layers(model: nn.Module, expected: nn.Module) -> None:
    """Compare the modules of a model with those that its Hugging Face class makes.

    A replaced module is accepted if it computes the same: an embedding, output matrix or norm of the same kind, or other dropout.

    Args:
        model: a model with the tensors of `expected`.
        expected: a model as its class makes it; shapes are enough.

    Raises:
        UnsupportedModelError: naming the first module that computes something else.
    """
    for name, original in expected.named_modules(remove_duplicate=False):
        if name in ("", "encoder"):  # their forward pass is an engine here
            continue
        try:
            found = base_layer(model.get_submodule(name))
        except AttributeError:
            found = None
        if not _computes_the_same(found, original):
            raise UnsupportedModelError(
                f"{name} got {_named(found)}; expected {_named(original)} of {type(expected).__name__}. Engines run that class's "
                "modules only: put one like it back, or use the Hugging Face class."
            )


def _computes_the_same(found: Any, original: nn.Module) -> bool:
    if isinstance(original, nn.Dropout):  # dropout does nothing in evaluation mode; training runs the module itself
        return isinstance(found, nn.Identity) or _forward_of(found).__module__ == dropout.__name__
    if hasattr(original, "variance_epsilon") and type(found) is nn.RMSNorm:
        return bool(found.eps == original.variance_epsilon)
    if not isinstance(found, type(original)) or _forward_of(found) is not _forward_of(original):
        return False
    if not original._modules and not original._parameters:  # an activation, whose settings are in its repr
        return found.extra_repr() == original.extra_repr()
    return all(getattr(found, name, None) == getattr(original, name, None) for name in ("variance_epsilon", "max_norm"))


def _forward_of(module: Any) -> Any:
    return getattr(type(module), "forward", nn.Module.forward)


def _named(module: nn.Module | None) -> str:
    """The name of a module's class with the settings that distinguish it."""
    if module is None or module._modules:
        return "no module" if module is None else type(module).__name__
    epsilon = getattr(module, "variance_epsilon", None)
    settings = module.extra_repr() if epsilon is None else f"variance_epsilon={epsilon}"
    return f"{type(module).__name__}({settings})"
