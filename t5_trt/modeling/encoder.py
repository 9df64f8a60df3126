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
from t5_trt.modeling.families import encoder_class
from t5_trt.modeling.generation_context import generation_of
from t5_trt.modeling.inputs import ForwardInputs
from t5_trt.modeling.reference import follow, take_layers
from t5_trt.modeling.runner import ModelRunner, ModelSettings
from t5_trt.modeling.weight_tracker import WeightWatch

#: attributes that copies of an encoder do not get
_OWN = ("_runner", "_lone_model", "_lone_runner", "_lone_watch")


class EngineEncoder:
    """The encoder module of a model on engines: the parameters of the Hugging Face stack with an engine as forward pass.

    An encoder without a model (a copy of it, or its model was deleted) creates its own runner over the same layers.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
        """Run the encoder engine; attention maps, hidden states of inner layers and gradients come from the Hugging Face model.

        Args:
            input_ids: int64 [B, S]; or `inputs_embeds` [B, S, E].
            attention_mask: [B, S], 0 for padding; None attends to everything.
            inputs_embeds: see `input_ids`.
            output_attentions: served by the Hugging Face model.
            output_hidden_states: served by the Hugging Face model.
            return_dict: False returns a tuple.
            kwargs: ignored, as by the Hugging Face class.
        """
        runner = self._find_runner()
        model = runner.model  # another thread may delete it
        runner.notice_changes()
        inputs = ForwardInputs(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            more=kwargs,
        )
        reason = runner.why_not_engines(inputs)
        if reason is None and self.__dict__["training"] and generation_of(runner) is None:
            reason = "training mode"  # of this module alone
        if reason is not None:
            follow(model.encoder, self)  # type: ignore[arg-type]
            checked = inputs.for_hugging_face(runner.architecture, runner.device)
            return runner.fall_back(reason).get_encoder()(**checked.encoder_arguments())
        result = runner.encode(inputs)
        return result.to_tuple() if return_dict is False else result

    def __getstate__(self) -> dict[str, Any]:
        state = cast("dict[str, Any]", super().__getstate__())  # type: ignore[misc]
        return {key: value for key, value in state.items() if key not in _OWN}

    def _find_runner(self) -> ModelRunner:
        """The runner of the model that this encoder is part of, else its own."""
        own = self.__dict__
        runner: ModelRunner | None = own["_runner"]() if "_runner" in own else None
        if runner is not None and runner.model._modules.get("encoder") is self:
            return runner
        if "_lone_runner" not in own or own["_lone_watch"].replaced():
            self._make_lone_runner()
        own["_lone_model"].training = own["training"]
        lone: ModelRunner = own["_lone_runner"]
        return lone

    def _make_lone_runner(self) -> None:
        own = self.__dict__
        kind, settings = encoder_class(own["config"]), own.get("_lone_settings", ModelSettings())
        model = without_data(kind, copy.deepcopy(own["config"]))
        take_layers(model.encoder, self)  # type: ignore[arg-type]
        model.shared = model.encoder.embed_tokens
        own["_lone_model"], own["_lone_runner"] = model, ModelRunner(model, kind, settings)
        own["_lone_watch"] = WeightWatch(self)  # type: ignore[arg-type]


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

    The reference to the model's runner is weak, so that no cycle keeps a deleted model alive, and in ``__dict__``, where nn.Module does
    not treat it as a submodule.
    """
    encoder, runner = model.encoder, model._runner
    if isinstance(encoder, EngineEncoder):
        encoder.__dict__["_runner"] = weakref.ref(runner)
        encoder.__dict__["_lone_settings"] = ModelSettings(runner.settings.runtime, runner.settings.build)
