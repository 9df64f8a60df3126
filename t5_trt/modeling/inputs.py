"""The arguments of one forward pass as one object, with their checks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from t5_trt.compat import CACHE
from t5_trt.errors import InputError
from t5_trt.validation import check_embeds, check_length, check_mask, check_reference_mask, check_token_ids

if TYPE_CHECKING:
    from t5_trt.config import RuntimeConfig
    from t5_trt.graph.architecture import Architecture

#: arguments that ask for attention maps or hidden states
INNER_VALUES = ("output_attentions", "output_hidden_states")
#: arguments that default to the config's setting -> value where the config lacks it
_SWITCHES = {"use_cache": True, "return_dict": True, **dict.fromkeys(INNER_VALUES, False)}


@dataclass(frozen=True)
class EncoderInputs:
    """Checked inputs of an encoder engine; one of `ids` and `embeds` is None.

    Attributes:
        ids: int64 [B, S].
        embeds: float32 [B, S, E].
        mask: int64 [B, S], 0 for padding.
    """

    ids: torch.Tensor | None
    embeds: torch.Tensor | None
    mask: torch.Tensor

    @property
    def source(self) -> torch.Tensor:
        """`ids` or `embeds`, whichever is not None."""
        source = self.ids if self.embeds is None else self.embeds
        assert source is not None
        return source


@dataclass(frozen=True)
class ForwardInputs:
    """What a caller passed to ``forward()`` of a model or an encoder, under the names of Hugging Face's arguments.

    Attributes:
        more: arguments that only the Hugging Face model reads.
    """

    input_ids: Any = None
    attention_mask: Any = None
    inputs_embeds: Any = None
    decoder_input_ids: Any = None
    decoder_attention_mask: Any = None
    decoder_inputs_embeds: Any = None
    encoder_outputs: Any = None
    cache: Any = None
    labels: Any = None
    use_cache: bool | None = None
    return_dict: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def with_defaults(self, config: Any) -> ForwardInputs:
        """A copy with the config's value for each switch that the caller left out."""
        found: dict[str, Any] = {
            name: getattr(config, name, default) if getattr(self, name) is None else getattr(self, name)
            for name, default in _SWITCHES.items()
        }
        return replace(self, **found)

    @property
    def inner_value(self) -> str | None:
        """The name of an argument that asks for attention maps or hidden states, which engines do not return; else None."""
        return next((name for name in INNER_VALUES if getattr(self, name)), None)

    def for_encoder(self, arch: Architecture, settings: RuntimeConfig, device: torch.device) -> EncoderInputs:
        """The encoder's inputs, checked and on the engines' device.

        Raises:
            InputError: both or none of ids and embeddings, or a wrong type, dtype, shape, length or value.
        """
        if (self.input_ids is None) == (self.inputs_embeds is None):
            got = "neither" if self.input_ids is None else "both"
            raise InputError(f"got {got} of input_ids and inputs_embeds; expected exactly one.")
        ids = embeds = None
        if self.inputs_embeds is None:
            ids = check_token_ids("input_ids", self.input_ids, arch.vocab_size, device)
        else:
            embeds = check_embeds("inputs_embeds", self.inputs_embeds, arch.d_model, device, torch.float32)
        batch, length = (self.input_ids if embeds is None else embeds).shape[:2]
        check_length("source", length, settings.max_source_tokens, arch.longest_source)
        return EncoderInputs(ids, embeds, check_mask("attention_mask", self.attention_mask, batch, length, device))

    def given_states(self) -> ModelOutput | None:
        """The caller's encoder output; a tuple, as ``return_dict=False`` gives, becomes a ModelOutput."""
        if self.encoder_outputs is None or isinstance(self.encoder_outputs, ModelOutput):
            return self.encoder_outputs
        return BaseModelOutput(*tuple(self.encoder_outputs)[:3])

    def decoder_tokens(self, arch: Architecture, device: torch.device) -> torch.Tensor:
        """The decoder's token ids, int64 [R, Q], checked and on the engines' device.

        Raises:
            InputError: they are missing, or have a wrong type, dtype, shape or value.
        """
        if self.decoder_input_ids is None:
            raise InputError("got neither decoder_input_ids nor labels; forward() expects one of them. To write text, use "
                             "generate().")  # fmt: skip
        return check_token_ids("decoder_input_ids", self.decoder_input_ids, arch.vocab_size, device)

    def for_hugging_face(self, arch: Architecture, device: torch.device) -> ForwardInputs:
        """A copy with token ids (int64) and masks checked and moved to the device of the Hugging Face model.

        Raises:
            InputError: one of them has a wrong type, dtype, shape or value.
        """
        given = (("input_ids", self.input_ids), ("decoder_input_ids", self.decoder_input_ids))
        source, target = (
            None if ids is None else check_token_ids(name, ids, arch.vocab_size, device) for name, ids in given
        )
        if source is not None and target is not None and len(source) not in (1, len(target)):
            raise InputError(
                f"decoder_input_ids has {len(target)} rows and input_ids {len(source)}; expected the same number."
            )
        attending = [ids for ids in (source, target) if ids is not None]
        mask = check_reference_mask("attention_mask", self.attention_mask, arch.num_heads, attending, source, device)
        decoder_mask = self.decoder_attention_mask
        of_four_axes = getattr(decoder_mask, "ndim", 0) == 4  # one of two axes may have another width
        keys = target if self.cache is None and of_four_axes else None
        queries = [] if target is None else [target]
        decoder_mask = check_reference_mask(
            "decoder_attention_mask", decoder_mask, arch.num_heads, queries, keys, device
        )
        return replace(
            self,
            input_ids=source,
            decoder_input_ids=target,
            attention_mask=mask,
            decoder_attention_mask=decoder_mask,
        )

    def encoder_arguments(self) -> dict[str, Any]:
        """Arguments for a Hugging Face encoder."""
        names = ("input_ids", "attention_mask", "inputs_embeds", "return_dict", *INNER_VALUES)
        return {**{name: getattr(self, name) for name in names}, **self.more}

    def model_arguments(self) -> dict[str, Any]:
        """Arguments for a Hugging Face ForConditionalGeneration model."""
        names = (
            "decoder_input_ids",
            "decoder_attention_mask",
            "decoder_inputs_embeds",
            "encoder_outputs",
            "labels",
            "use_cache",
        )
        return {**self.encoder_arguments(), **{name: getattr(self, name) for name in names}, CACHE: self.cache}


def check_labels(labels: Any, vocab_size: int) -> torch.Tensor:
    """Return labels as int64 [R, Q].

    Args:
        labels: token ids, -100 where no loss is wanted.
        vocab_size: V.

    Raises:
        InputError: they have a wrong type, dtype, shape or value.
    """
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise InputError(
            f"labels got {getattr(labels, 'dtype', type(labels).__name__)}; expected int64 [batch, tokens]."
        )
    check_token_ids("labels", labels.masked_fill(labels == -100, 0), vocab_size, labels.device)
    return labels.long()


def check_labels_fit(labels: torch.Tensor, decoder_input_ids: Any) -> None:
    """Check that labels have the shape of the decoder's tokens.

    Raises:
        InputError: naming both shapes.
    """
    if isinstance(decoder_input_ids, torch.Tensor) and labels.shape != decoder_input_ids.shape:
        raise InputError(
            f"labels got shape {tuple(labels.shape)}; expected that of the decoder's input, "
            f"{tuple(decoder_input_ids.shape)}."
        )


def check_start_tokens(config: Any) -> None:
    """Check that the config has the tokens that are needed to make the decoder's input from labels.

    Raises:
        InputError: the config lacks one.
    """
    for name in ("decoder_start_token_id", "pad_token_id"):  # T5Config need not have the first
        if getattr(config, name, None) is None:
            raise InputError(
                f"labels got no decoder_input_ids, and the config has no {name} to make them with. Set model.config.{name} (T5 "
                "starts with the padding token, 0), or pass decoder_input_ids."
            )
