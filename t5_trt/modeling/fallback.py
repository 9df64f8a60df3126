"""Which requests engines cannot serve; `ModelRunner.fall_back` gives the Hugging Face model that serves them."""

from __future__ import annotations

from typing import Any

import torch

from t5_trt.errors import InputError
from t5_trt.modeling.gradients import comes_from_engine
from t5_trt.modeling.inputs import ForwardInputs


def why_beyond_engines(
    inputs: ForwardInputs, model: Any, device: torch.device, *, strict: bool, generating: bool, adapted_rows: bool
) -> str | None:
    """Why engines cannot serve a request, or None if they can.

    Args:
        inputs: as the caller gave them.
        model: with its mode and parameters.
        device: of the engines.
        strict: the Hugging Face model must not be used.
        generating: the request is part of a ``generate()`` call, which runs on engines in training mode too.
        adapted_rows: peft was given ``adapter_names``, one for each row of the batch.

    Raises:
        InputError: the request is a training step on a GPU.
    """
    if adapted_rows:
        return "adapter_names"
    if inputs.inner_value is not None:
        return inputs.inner_value
    if inputs.decoder_inputs_embeds is not None:
        return "decoder_inputs_embeds"
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = getattr(inputs, name)
        if isinstance(mask, torch.Tensor) and mask.dim() > 2:
            return f"a {mask.dim()}-D {name}"
    states = None if inputs.encoder_outputs is None else inputs.encoder_outputs[0]
    wants_gradients = any(getattr(source, "requires_grad", False) for source in (inputs.inputs_embeds, states))
    if wants_gradients and torch.is_grad_enabled() and not comes_from_engine(states):
        return "gradients"
    if generating:
        return None
    trains = inputs.labels is not None and torch.is_grad_enabled()
    if model.training:  # dropout: Monte Carlo dropout wants it without gradients too
        if trains and device.type != "cpu":
            raise InputError(
                f"training got a model on {device}, whose gradients would not reach its parameters, which are on the CPU; "
                "expected the Hugging Face class. Train that, then use from_model() or save_pretrained(); or call eval()."
            )
        return "training mode"
    if not trains or strict or device.type != "cpu":
        return None
    return "gradients" if any(weight.requires_grad for weight in model.parameters()) else None
