"""The model's encoder module: the Hugging Face stack with its forward pass exchanged for the encoder engine."""

from __future__ import annotations

import copy
import weakref
from typing import Any, cast

import torch
from transformers.models.mt5.modeling_mt5 import MT5Stack
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.umt5.modeling_umt5 import UMT5Stack

from t5_trt.checkpoint.load import without_data
from t5_trt.modeling.reference import follow, take_layers
from t5_trt.modeling.weight_tracker import WeightWatch
from t5_trt.runtime.exits import at_work

#: what belongs to one encoder and not to its copies
_OWN = ("_owner", "_lone_model", "_lone_watch")


class EngineEncoder:
    """The encoder module of a model on engines: its parameters are the Hugging Face stack's, its forward pass is an engine.

    An encoder that has no model (it was copied out of it, or the model was deleted) makes one of its own over the same layers.
    """

    # Transformers evaluates these annotations, so they name no class of ours
    _owner: Any  # a weak reference to the model
    _lone_kind: Any  # the class and the settings of a model of its own

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
        """See `EngineForward.encode`; attention maps, inner states and gradients come from the Hugging Face model."""
        owner = self._model()
        owner._notice_changes()
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        reason = owner._beyond_engines(wanted, attention_mask, None, None, inputs_embeds)
        if reason is None and self.__dict__["training"] and owner._beams_ahead is None:
            reason = "training mode"  # of this module alone
        if reason:
            follow(owner.encoder, self)  # type: ignore[arg-type]
            input_ids, _, attention_mask, _ = owner._checked_for_reference(input_ids, None, attention_mask)
            encoder = owner._use_reference(reason).get_encoder()
            return encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
                return_dict=return_dict, **wanted, **kwargs,
            )  # fmt: skip
        result = owner.encode(input_ids, attention_mask, inputs_embeds)
        return result.to_tuple() if return_dict is False else result

    def __getstate__(self) -> dict[str, Any]:
        state = cast("dict[str, Any]", super().__getstate__())  # type: ignore[misc]
        return {key: value for key, value in state.items() if key not in _OWN}

    def _model(self) -> Any:
        """The model whose engines run this encoder."""
        own = self.__dict__
        owner = own["_owner"]() if "_owner" in own else None
        if owner is not None and owner._modules.get("encoder") is self:
            return owner
        if "_lone_model" not in own or own["_lone_watch"].replaced():
            kind, runtime, build = own["_lone_kind"]
            made = without_data(kind, copy.deepcopy(own["config"]))
            take_layers(made.encoder, self)  # type: ignore[arg-type]
            made.shared = made.encoder.embed_tokens
            made._configure(runtime, build)
            own["_lone_model"], own["_lone_watch"] = made, WeightWatch(self)  # type: ignore[arg-type]
        made = own["_lone_model"]
        made.training = own["training"]
        return made


class EngineT5Stack(EngineEncoder, T5Stack):
    """Encoder stack of a T5Config."""


class EngineMT5Stack(EngineEncoder, MT5Stack):
    """Encoder stack of an MT5Config."""


class EngineUMT5Stack(EngineEncoder, UMT5Stack):
    """Encoder stack of a UMT5Config."""


_STACKS = {T5Stack: EngineT5Stack, MT5Stack: EngineMT5Stack, UMT5Stack: EngineUMT5Stack}


def engine_encoder(encoder: Any) -> None:
    """Exchange the class of an encoder stack in place: it keeps its parameters and its names in the state dict."""
    encoder.__class__ = _STACKS.get(type(encoder), type(encoder))


def attach_encoder(model: Any) -> None:
    """Have ``model.encoder`` run on the engines of this model, if it is a module that can.

    The way back is a weak reference in ``__dict__``, where nn.Module does not take it for a submodule: no cycle keeps a model that
    was deleted.
    """
    encoder = model.encoder
    if isinstance(encoder, EngineEncoder):
        encoder.__dict__["_owner"] = weakref.ref(model)
        encoder.__dict__["_lone_kind"] = (model._encoder_class, model._runtime_config, model._build_config)
