"""The classes that users import: Hugging Face's T5 classes with engines in place of their forward pass."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GenerationMixin,
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    PreTrainedModel,  # noqa: F401 - diffusers looks for it beside a class to know how that is loaded
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
)

from t5_trt.modeling.base import EngineModel
from t5_trt.modeling.generate import EngineGeneration


class TRTT5ForConditionalGeneration(EngineGeneration, EngineModel, GenerationMixin):
    """Drop-in replacement of ``T5ForConditionalGeneration`` for inference.

    ``TRTT5ForConditionalGeneration.from_pretrained(...)`` returns an instance of this class and, at the same time, of
    the checkpoint's stock class. Engines are opened by the first ``forward`` or ``generate``.

    Args:
        config: a T5Config, MT5Config or UMT5Config; the weights are random, as in the stock classes.
    """


class TRTT5(TRTT5ForConditionalGeneration, T5ForConditionalGeneration):
    """`TRTT5ForConditionalGeneration` of a T5Config; also an instance of `T5ForConditionalGeneration`."""

    _stock_class = T5ForConditionalGeneration


class TRTMT5(TRTT5ForConditionalGeneration, MT5ForConditionalGeneration):
    """`TRTT5ForConditionalGeneration` of an MT5Config; also an instance of `MT5ForConditionalGeneration`."""

    _stock_class = MT5ForConditionalGeneration


class TRTUMT5(TRTT5ForConditionalGeneration, UMT5ForConditionalGeneration):
    """`TRTT5ForConditionalGeneration` of a UMT5Config; also an instance of `UMT5ForConditionalGeneration`."""

    _stock_class = UMT5ForConditionalGeneration


TRTT5ForConditionalGeneration._families = {"t5": TRTT5, "mt5": TRTMT5, "umt5": TRTUMT5}


class TRTT5EncoderModel(EngineModel):
    """Drop-in replacement of ``T5EncoderModel`` (and the mT5 and UMT5 ones): text encoders, sentence encoders.

    It loads encoder-only checkpoints and the encoder of complete ones. ``model(input_ids, attention_mask)`` gives
    ``last_hidden_state`` [B, S, E]; attention maps, inner states and gradients come from the stock model.

    Args:
        config: a T5Config, MT5Config or UMT5Config; the weights are random, as in the stock classes.
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
            output_attentions: served by the stock model.
            output_hidden_states: served by the stock model.
            return_dict: False returns a tuple.
            kwargs: ignored, as by the stock class.

        Returns:
            BaseModelOutput: last_hidden_state [B, S, E].

        Raises:
            InputError, StrictModeError, BackendError: as `TRTT5ForConditionalGeneration.forward`.
        """
        wanted = self._wanted_outputs(output_attentions, output_hidden_states)
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return self.get_encoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=as_dict,
            **wanted,
            **kwargs,
        )


class TRTT5Encoder(TRTT5EncoderModel, T5EncoderModel):
    """`TRTT5EncoderModel` of a T5Config; also an instance of `T5EncoderModel`."""

    _stock_class = T5EncoderModel


class TRTMT5Encoder(TRTT5EncoderModel, MT5EncoderModel):
    """`TRTT5EncoderModel` of an MT5Config; also an instance of `MT5EncoderModel`."""

    _stock_class = MT5EncoderModel


class TRTUMT5Encoder(TRTT5EncoderModel, UMT5EncoderModel):
    """`TRTT5EncoderModel` of a UMT5Config; also an instance of `UMT5EncoderModel`."""

    _stock_class = UMT5EncoderModel


TRTT5EncoderModel._families = {"t5": TRTT5Encoder, "mt5": TRTMT5Encoder, "umt5": TRTUMT5Encoder}
for _whole, _alone in ((TRTT5, TRTT5Encoder), (TRTMT5, TRTMT5Encoder), (TRTUMT5, TRTUMT5Encoder)):
    _whole._encoder_class = _alone._encoder_class = _alone
