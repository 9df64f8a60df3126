"""The forward pass: from the arguments of ``forward()`` to its result."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import Seq2SeqLMOutput

from t5_trt.compat import CACHE, names_cache_as_hugging_face, takes_old_cache_names
from t5_trt.modeling.inputs import ForwardInputs, check_labels, check_labels_fit, check_start_tokens
from t5_trt.modeling.runner import ModelRunner


def run_forward(model: Any, inputs: ForwardInputs) -> Any:
    """Run encoder and decoder on engines, or all of it on the Hugging Face model where engines cannot serve the request.

    Args:
        model: with a runner.
        inputs: as the caller gave them; encode and decode check them.

    Returns:
        Seq2SeqLMOutput, or a tuple of its values.
    """
    runner: ModelRunner = model._runner
    runner.notice_changes()
    inputs = _with_decoder_tokens(model, inputs.with_defaults(model.config))
    reason = runner.why_not_engines(inputs)
    if reason is not None:
        checked = inputs.for_hugging_face(runner.architecture, runner.device)
        return runner.fall_back(reason)(**checked.model_arguments())
    encoded = inputs.given_states()
    if encoded is None:
        encoded = runner.encode(inputs)
    tokens = inputs.decoder_tokens(runner.architecture, runner.device)
    cache, logits = runner.decode(inputs, tokens, encoded)
    result = Seq2SeqLMOutput(
        loss=None if inputs.labels is None else _loss(logits, inputs.labels),
        logits=logits,
        encoder_last_hidden_state=encoded[0],
        encoder_hidden_states=getattr(encoded, "hidden_states", None),
        encoder_attentions=getattr(encoded, "attentions", None),
        **{CACHE: cache if inputs.use_cache else None},
    )
    return result if inputs.return_dict else result.to_tuple()


def _with_decoder_tokens(model: Any, inputs: ForwardInputs) -> ForwardInputs:
    """The inputs with labels checked, and with the decoder's tokens made from them where there are none."""
    if inputs.labels is None:
        return inputs
    labels = check_labels(inputs.labels, model.architecture.vocab_size)
    if inputs.decoder_input_ids is None and inputs.decoder_inputs_embeds is None:
        return replace(inputs, labels=labels, decoder_input_ids=model._shift_right(labels))
    check_labels_fit(labels, inputs.decoder_input_ids)
    return replace(inputs, labels=labels)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, of the logits' dtype."""
    target = labels.to(logits.device).flatten()
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), target, ignore_index=-100).to(logits.dtype)


class EngineForward:
    """`forward` of a model with encoder and decoder; its signature is Hugging Face's."""

    if TYPE_CHECKING:
        config: Any  # Transformers would read an annotation as the config's class

    @takes_old_cache_names(past_key_values="5.40.0")
    # there is nothing to compile: tracing would end in ONNX Runtime
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @names_cache_as_hugging_face
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run encoder (unless `encoder_outputs` are given) and decoder, as ``T5ForConditionalGeneration.forward``.

        Args:
            input_ids: int64 [B, S]; or `inputs_embeds` [B, S, E].
            attention_mask: [B, S], 0 for padding; None attends to everything.
            decoder_input_ids: int64 [R, Q], any number of tokens; made from `labels` if left out.
            decoder_attention_mask: [R, cached + Q], 0 for padding on either side; further entries are ignored, as by the Hugging Face class.
            encoder_outputs: a ModelOutput or tuple whose first entry is [B, S, E].
            cache: what an earlier call returned, or a Hugging Face ``EncoderDecoderCache``; called ``past_key_values`` before
                Transformers 5.24.
            inputs_embeds: see `input_ids`.
            decoder_inputs_embeds: [R, Q, E]; served by the Hugging Face model, as are the next two.
            output_attentions: return attention maps.
            output_hidden_states: return hidden states.
            labels: int64 [R, Q], -100 where no loss is wanted.
            use_cache: return a cache (default: the config's).
            return_dict: False returns a tuple.
            kwargs: ignored, as by the Hugging Face class.

        Returns:
            Seq2SeqLMOutput: loss (scalar, with `labels`), logits [R, Q, V] (float32 on a GPU), cache (named
            as the argument), encoder_last_hidden_state [B, S, E].

        Raises:
            InputError: an argument has a wrong type, dtype, shape or value.
            StrictModeError: engines cannot serve the request and the model was loaded with ``strict=True``.
            BackendError: the backend failed.
        """
        inputs = ForwardInputs(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_outputs=encoder_outputs,
            cache=cache,
            labels=labels,
            use_cache=use_cache,
            return_dict=return_dict,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            more=kwargs,
        )
        return run_forward(self, inputs)

    def _shift_right(self, input_ids: torch.Tensor) -> torch.Tensor:
        check_start_tokens(self.config)
        shifted: torch.Tensor = super()._shift_right(input_ids)  # type: ignore[misc]
        return shifted
