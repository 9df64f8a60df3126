"""The model's encoder module: the stock stack with its forward pass exchanged for the encoder engine."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.models.mt5.modeling_mt5 import MT5Stack
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.umt5.modeling_umt5 import UMT5Stack

from t5_trt.errors import InputError
from t5_trt.runtime.exits import at_work


class EngineEncoder:
    """The encoder module of a model on engines: its parameters are the stock stack's, its forward pass is an engine."""

    _owner: Any  # a weak reference to the model; Transformers evaluates this annotation, so it names no class of ours

    @at_work()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """See `EngineForward.encode`; attention maps, inner states and gradients come from the stock model."""
        owner = self._owner()
        if owner is None:
            raise InputError("the model that this encoder belongs to is gone; keep a reference to the model itself.")
        owner._notice_changes()
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        reason = owner._beyond_engines(wanted, attention_mask, None, None, inputs_embeds)
        if reason:
            input_ids, _, attention_mask, _ = owner._checked_for_reference(input_ids, None, attention_mask)
            encoder = owner._use_reference(reason).get_encoder()
            return encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
                return_dict=return_dict, **wanted, **kwargs,
            )  # fmt: skip
        result = owner.encode(input_ids, attention_mask, inputs_embeds)
        return result.to_tuple() if return_dict is False else result

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_owner"}


class EngineT5Stack(EngineEncoder, T5Stack):
    """Encoder stack of a T5Config."""


class EngineMT5Stack(EngineEncoder, MT5Stack):
    """Encoder stack of an MT5Config."""


class EngineUMT5Stack(EngineEncoder, UMT5Stack):
    """Encoder stack of a UMT5Config."""


_STACKS = {T5Stack: EngineT5Stack, MT5Stack: EngineMT5Stack, UMT5Stack: EngineUMT5Stack}


def attach_encoder(model: Any) -> None:
    """Make ``model.encoder`` run the engine.

    The class of the module is exchanged in place: it keeps its parameters and its names in the state dict. The way back
    to the model is a weak reference in ``__dict__``, where nn.Module does not take it for a submodule.
    """
    encoder = model.encoder
    encoder.__class__ = _STACKS.get(type(encoder), type(encoder))
    encoder.__dict__["_owner"] = weakref.ref(model)
