"""The classes that users import: Hugging Face's T5 classes with engines in place of their forward pass."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GenerationMixin,
    PreTrainedModel,  # noqa: F401 - diffusers looks for it beside a class to know how that is loaded
)

from t5_trt.modeling.base import EngineModel
from t5_trt.modeling.families import FAMILIES, named_family_class
from t5_trt.modeling.forward import EngineForward
from t5_trt.modeling.generate import EngineGeneration
from t5_trt.modeling.inputs import ForwardInputs


class TRTT5ForConditionalGeneration(EngineGeneration, EngineForward, EngineModel, GenerationMixin):
    """Drop-in replacement of ``T5ForConditionalGeneration`` for inference.

    ``TRTT5ForConditionalGeneration.from_pretrained(...)`` returns an instance of this class and, at the same time, of
    the checkpoint's Hugging Face class. Engines are opened by the first ``forward`` or ``generate``.

    Args:
        config: a T5Config, MT5Config or UMT5Config; the weights are random, as in the Hugging Face classes.
    """


class TRTT5EncoderModel(EngineModel):
    """Drop-in replacement of ``T5EncoderModel`` (and the mT5 and UMT5 ones): text encoders, sentence encoders.

    It loads encoder-only checkpoints and the encoder of complete ones. ``model(input_ids, attention_mask)`` gives
    ``last_hidden_state`` [B, S, E]; attention maps, hidden states of inner layers and gradients come from the Hugging Face model.

    Args:
        config: a T5Config, MT5Config or UMT5Config; the weights are random, as in the Hugging Face classes.
    """

    _encoder_only = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the encoder, as ``T5EncoderModel.forward``.

        Args:
            input_ids: int64 [B, S]; or `inputs_embeds` [B, S, E].
            attention_mask: [B, S], 0 for padding; None attends to everything.
            inputs_embeds: see `input_ids`.
            output_attentions: served by the Hugging Face model.
            output_hidden_states: served by the Hugging Face model.
            return_dict: False returns a tuple.
            kwargs: ignored, as by the Hugging Face class.

        Returns:
            BaseModelOutput: last_hidden_state [B, S, E].

        Raises:
            InputError, StrictModeError, BackendError: as `TRTT5ForConditionalGeneration.forward`.
        """
        switches = ForwardInputs(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        ).with_defaults(self.config)
        return self.get_encoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=switches.output_attentions,
            output_hidden_states=switches.output_hidden_states,
            return_dict=switches.return_dict,
            **kwargs,
        )


TRTT5 = named_family_class(TRTT5ForConditionalGeneration, FAMILIES["t5"].whole, "TRTT5")
TRTMT5 = named_family_class(TRTT5ForConditionalGeneration, FAMILIES["mt5"].whole, "TRTMT5")
TRTUMT5 = named_family_class(TRTT5ForConditionalGeneration, FAMILIES["umt5"].whole, "TRTUMT5")
TRTT5Encoder = named_family_class(TRTT5EncoderModel, FAMILIES["t5"].encoder, "TRTT5Encoder")
TRTMT5Encoder = named_family_class(TRTT5EncoderModel, FAMILIES["mt5"].encoder, "TRTMT5Encoder")
TRTUMT5Encoder = named_family_class(TRTT5EncoderModel, FAMILIES["umt5"].encoder, "TRTUMT5Encoder")
