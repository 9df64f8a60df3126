"""The Hugging Face model behind a model on engines: new containers around the same layers.

Layers (embeddings, linear layers, norms, dropout, activations) are shared as objects, so replacing or changing one
affects both models. Containers (stacks, blocks, attention) are new, because they hold the config, which asks for eager attention here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from t5_trt.checkpoint.load import check_tensors, without_data
from t5_trt.modeling.adapter_layers import base_layer
from t5_trt.modeling.adapters import base_weights
from t5_trt.modeling.layer_checks import check_layers


def make_reference(model: Any, kind: type[PreTrainedModel], device: torch.device) -> PreTrainedModel:
    """A Hugging Face model with the layers of `model`; on another device than the CPU, with float32 copies of them.

    Args:
        model: a model on engines.
        kind: its Hugging Face class.
        device: where the result runs.

    Raises:
        UnsupportedModelError: the model has other modules than that class.
    """
    config = copy.deepcopy(model.config)
    # only eager attention returns attention maps; set first, because Transformers 5.17 does not update the stacks' copies afterwards
    config._attn_implementation = "eager"
    made: PreTrainedModel = without_data(kind, config)
    check_tensors(base_weights(model)[0], made.state_dict(), kind)
    check_layers(model, made)
    take_layers(made, model)
    return made if device.type == "cpu" else _on_device(made, device)


def share_layers(kind: type[PreTrainedModel], source: Any) -> Any:
    """A model of class `kind` that shares the layers of a model with adapters, in evaluation mode: switching or training one affects both.

    Raises:
        UnsupportedModelError: `source` has other modules than that class.
    """
    made: Any = without_data(kind, source.config)
    check_tensors(base_weights(source)[0], made.state_dict(), kind)
    take_layers(made, source)
    for name in ("_hf_peft_config_loaded", "peft_config"):
        if name in source.__dict__:
            made.__dict__[name] = source.__dict__[name]
    return made.eval()


def take_layers(target: nn.Module, source: nn.Module) -> None:
    """Replace the layers of `target` (modules without children, and peft layers) by those of `source`."""
    for name, container in target.named_modules(remove_duplicate=False):
        ours = source.get_submodule(name)
        for child in list(container._modules):
            layer = ours._modules[child]
            if layer is None or not layer._modules or base_layer(layer) is not layer:
                container._modules[child] = layer


def follow(reference: nn.Module, model: nn.Module) -> None:
    """Copy settings to the containers of a reference: mode, attention dropout, gradient checkpointing."""
    for name, theirs in reference.named_modules(remove_duplicate=False):
        ours = model.get_submodule(name)
        for key, value in ours.__dict__.items() if ours is not theirs else ():
            if (isinstance(value, bool | int | float) and key[0] != "_") or key == "_gradient_checkpointing_func":
                theirs.__dict__[key] = value


def _on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Copy the model's layers to a device in float32; tied parameters stay tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        moved = parameter.detach().to(device, torch.float32)
        memo[id(parameter)] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)
