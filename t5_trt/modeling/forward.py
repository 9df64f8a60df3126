"""The forward pass, as a mixin over a stock T5 class.

A request goes to the engines unless it asks for something they cannot give (see `_beyond_engines`); that goes to the
stock PyTorch model over the same weights. Nothing here loads, builds or chooses engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import ModelOutput

from t5_trt.compat import CACHE, names_cache_as_stock, takes_old_cache_names
from t5_trt.errors import InputError
from t5_trt.generation.encoder_output import EngineEncoderOutput
from t5_trt.generation.kv_cache import write_stock
from t5_trt.generation.open_cache import decode, open_cache
from t5_trt.modeling.fallback import ReferenceFallback
from t5_trt.modeling.gradients import Replay, with_gradients
from t5_trt.modeling.weight_tracker import WeightWatch
from t5_trt.runtime.exits import at_work
from t5_trt.validation import check_embeds, check_length, check_mask, check_token_ids

if TYPE_CHECKING:
    from t5_trt.runtime.session import Session


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """No gradients, and no inference tensors either.

    Buffers outlive the call: made under ``torch.inference_mode()`` they could not be written to outside of it, and
    would not count their versions, by which changed encoder states are noticed.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class EngineForward(ReferenceFallback):
    """`forward` on engines; mixed in before a stock ForConditionalGeneration class."""

    if TYPE_CHECKING:
        encoder: Any
        _session_weights: WeightWatch | None

        def _opened(self) -> Session: ...
        @property
        def dtype(self) -> torch.dtype: ...  # noqa: D102
        def _notice_changes(self) -> None: ...
        def _in_own_dtype(self, result: torch.Tensor) -> torch.Tensor: ...

    @takes_old_cache_names(past_key_values="5.40.0")
    # nothing is left to compile, and tracing ends in ONNX Runtime
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @names_cache_as_stock
    @at_work()
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
            decoder_attention_mask: [R, cached + Q], 0 for padding on either side; what is beyond is left out, as by the Hugging Face class.
            encoder_outputs: a ModelOutput or tuple whose first entry is [B, S, E].
            cache: what an earlier call returned, or a stock ``EncoderDecoderCache``; called ``past_key_values`` before
                Transformers 5.24.
            inputs_embeds: see `input_ids`.
            decoder_inputs_embeds: [R, Q, E]; served by the stock model.
            labels: int64 [R, Q], -100 where no loss is wanted.
            use_cache: return a cache (default: the config's).
            output_attentions: served by the stock model.
            output_hidden_states: served by the stock model.
            return_dict: False returns a tuple.
            kwargs: ignored, as by the stock class.

        Returns:
            Seq2SeqLMOutput: loss (scalar, with `labels`), logits [R, Q, V] (float32 on a GPU), cache (named
            as the argument), encoder_last_hidden_state [B, S, E].

        Raises:
            InputError: an argument has a wrong type, dtype, shape or value.
            StrictModeError: engines cannot serve the request and the model was loaded with ``strict=True``.
            BackendError: the backend failed.
        """
        self._notice_changes()
        wanted = self._wanted_outputs(output_attentions, output_hidden_states)
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        if labels is not None:
            labels = self._check_labels(labels)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self._shift_right(labels)
            elif isinstance(decoder_input_ids, torch.Tensor) and labels.shape != decoder_input_ids.shape:
                raise InputError(
                    f"labels got shape {tuple(labels.shape)}; expected that of the decoder's input, "
                    f"{tuple(decoder_input_ids.shape)}."
                )
        reason = self._beyond_engines(
            wanted,
            attention_mask,
            decoder_attention_mask,
            decoder_inputs_embeds,
            inputs_embeds,
            encoder_outputs,
            labels,
        )
        if reason:
            input_ids, decoder_input_ids, attention_mask, decoder_attention_mask = self._checked_for_reference(
                input_ids, decoder_input_ids, attention_mask, decoder_attention_mask, cache
            )
            return self._use_reference(reason)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs,
                inputs_embeds=inputs_embeds,
                decoder_inputs_embeds=decoder_inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                return_dict=as_dict,
                **{CACHE: cache},
                **wanted,
                **kwargs,
            )
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_ids, attention_mask, inputs_embeds)
        elif not isinstance(encoder_outputs, ModelOutput):  # a tuple, as return_dict=False gives
            encoder_outputs = BaseModelOutput(*tuple(encoder_outputs)[:3])
        if decoder_input_ids is None:
            raise InputError("got neither decoder_input_ids nor labels; forward() expects one of them. To write text, use "
                             "generate().")  # fmt: skip
        tokens = check_token_ids("decoder_input_ids", decoder_input_ids, self.architecture.vocab_size, self.device)
        with ordinary_tensors():
            opened = open_cache(self._opened(), cache, encoder_outputs, attention_mask, len(tokens))
            longest = self.runtime_config.max_target_tokens
            logits = decode(self._opened(), opened, tokens, decoder_attention_mask, longest)
            opened.dtype = self.dtype
            if cache is not None and cache is not opened:  # written in place, as the Hugging Face class does
                write_stock(cache, opened, tokens.shape[1])
        logits = self._in_own_dtype(logits)
        if torch.is_grad_enabled():
            inputs = (attention_mask, tokens, decoder_attention_mask)
            logits = self._replayable("decoder", logits, inputs, encoder_outputs[0], cached=cache is not None)
        loss = None
        if labels is not None:
            target = labels.to(logits.device).flatten()
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), target, ignore_index=-100).to(logits.dtype)
        result = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
            **{CACHE: (opened if cache is None else cache) if use_cache else None},
        )
        return result if as_dict else result.to_tuple()

    def encode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> EngineEncoderOutput:
        """Run the encoder engine.

        Args:
            input_ids: int64 [B, S], or None with `inputs_embeds`.
            attention_mask: [B, S], 0 for padding.
            inputs_embeds: [B, S, E], or None with `input_ids`.

        Returns:
            last_hidden_state [B, S, E], with the decoder's cross-attention K/V attached.

        Raises:
            InputError: both or none of the inputs, or a wrong type, dtype, shape or value.
        """
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise InputError(f"got {got} of input_ids and inputs_embeds; expected exactly one.")
        session, arch = self._opened(), self.architecture
        if inputs_embeds is not None:
            inputs_embeds = check_embeds("inputs_embeds", inputs_embeds, arch.d_model, session.device, torch.float32)
        else:
            input_ids = check_token_ids("input_ids", input_ids, arch.vocab_size, session.device)
        source = input_ids if inputs_embeds is None else inputs_embeds
        assert source is not None
        batch, length = source.shape[:2]
        check_length("source", length, self.runtime_config.max_source_tokens, arch.longest_source)
        mask = check_mask("attention_mask", attention_mask, batch, length, session.device)
        with ordinary_tensors():
            hidden, cross = session.encode(input_ids, inputs_embeds, mask, self._beams_ahead)
        hidden = self._in_own_dtype(hidden)
        if torch.is_grad_enabled():
            hidden = self._replayable("encoder", hidden, (source, mask))
        return EngineEncoderOutput(last_hidden_state=hidden).remember(cross, session)  # type: ignore[arg-type]

    def _replayable(self, part: str, result: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
        if self._session_weights is None:  # the session was given, not opened
            self._session_weights = WeightWatch(self)  # type: ignore[arg-type]
        return with_gradients(result, Replay(self, part, self._session_weights, **options), *inputs)
