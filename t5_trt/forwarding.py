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

from t5_trt.errors import InputError
from t5_trt.fallback import ReferenceFallback
from t5_trt.generation.encoder_output import EngineEncoderOutput, recall
from t5_trt.generation.engine_cache import EngineCache, read_stock, write_stock
from t5_trt.gradients import Replay, with_gradients
from t5_trt.inputs import check_embeds, check_length, check_mask, check_token_ids
from t5_trt.runtime.buffers import CrossStates
from t5_trt.runtime.exits import at_work
from t5_trt.transformers_api import CACHE, names_cache_as_stock, takes_old_cache_names

if TYPE_CHECKING:
    from t5_trt.runtime.session import Session
    from t5_trt.weight_watch import WeightWatch


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
        def _notice_changes(self) -> None: ...

    @takes_old_cache_names(past_key_values="5.40.0")
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
            decoder_attention_mask: [R, cached + Q], 0 for padding on either side.
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
            Seq2SeqLMOutput: loss (float32 scalar, with `labels`), logits float32 [R, Q, V], cache (named
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
                **{CACHE: cache.stock() if isinstance(cache, EngineCache) else cache},
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
            opened = self._open_cache(cache, encoder_outputs, attention_mask, len(tokens))
            logits = self._decode(opened, tokens, decoder_attention_mask, cache)
        if torch.is_grad_enabled():
            inputs = (attention_mask, tokens, decoder_attention_mask)
            logits = self._replayable("decoder", logits, inputs, encoder_outputs[0], cached=cache is not None)
        loss = None
        if labels is not None:
            target = labels.to(logits.device).flatten()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), target, ignore_index=-100)
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
        if torch.is_grad_enabled():
            hidden = self._replayable("encoder", hidden, (source, mask))
        return EngineEncoderOutput(last_hidden_state=hidden).remember(cross, session)  # type: ignore[arg-type]

    def _replayable(self, part: str, result: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
        assert self._session_weights is not None
        return with_gradients(result, Replay(self, part, self._session_weights, **options), *inputs)

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder module; calling it runs the encoder engine."""
        return self.encoder

    def _open_cache(self, past: Any, encoder_outputs: Any, attention_mask: Any, rows: int) -> EngineCache:
        """The cache to decode with: the given one, or a new one over the encoder's K/V."""
        session, layers = self._opened(), self.architecture.decoder_layers
        cache = past if isinstance(past, EngineCache) else EngineCache(layers)
        if cache.state is None:
            own = cross = None
            if past is not None and past is not cache:
                own, cross = read_stock(past, layers, session.dtype, session.device)
            cross = cross or self._cross_states(encoder_outputs, rows)
            capacity = max(cache.capacity_tokens, 0 if own is None else own.shape[4])
            mask = self._source_mask(attention_mask, cross)
            cache.state = session.start(cross, capacity, mask)
            if mask is not None:
                cache.mask_source = _version_of(attention_mask)
            if own is not None:
                cache.state.append(own)
        if cache.state.rows != rows:
            raise InputError(
                f"decoder_input_ids has {rows} rows; the cache was made for {cache.state.rows}. Start with "
                f"{CACHE}=None, or reorder the cache with batch_select_indices."
            )
        self._apply_mask(cache, attention_mask)
        return cache

    def _cross_states(self, encoder_outputs: Any, rows: int) -> CrossStates:
        cross = recall(encoder_outputs, self._opened())
        if cross is None:
            hidden = encoder_outputs[0]
            arch, session = self.architecture, self._opened()
            cross = session.project_cross(
                check_embeds("encoder_outputs[0]", hidden, arch.d_model, session.device, session.dtype)
            )
        if cross.rows != rows:
            if cross.rows != 1:
                raise InputError(
                    f"decoder_input_ids has {rows} rows and the encoder's output {cross.rows}; expected the same number."
                )
            cross = cross.for_beams(rows)
        return cross

    def _source_mask(self, mask: Any, cross: CrossStates) -> torch.Tensor | None:
        """`attention_mask`, checked, with one row for each source; None if it has different ones for beams of one source."""
        given = len(mask) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else cross.batch
        rows = given if given in (cross.batch, cross.rows) else cross.batch
        checked = check_mask("attention_mask", mask, rows, cross.source_length, self._opened().device)
        if rows == cross.batch:
            return checked
        grouped = checked.view(cross.batch, cross.beams, -1)
        return grouped[:, 0] if bool((grouped == grouped[:, :1]).all()) else None

    def _apply_mask(self, cache: EngineCache, mask: Any) -> None:
        """Bring the state's cross bias in line with `attention_mask`, doing nothing while it is the same tensor."""
        source, known = _version_of(mask), cache.mask_source
        if known is not None and source is not None and known[0] is mask and known[1] == source[1]:
            return
        state = cache.state
        assert state is not None
        checked = self._source_mask(mask, state.cross)
        if checked is None:  # somebody made them differ
            state.separate_sources()
            checked = self._source_mask(mask, state.cross)
            assert checked is not None
        bias = self._opened().cross_bias(checked, state.cross)
        if bias.shape != state.cross_bias.shape or not torch.equal(bias, state.cross_bias):
            state.hide_keys(bias)
        cache.mask_source = source

    def _decode(self, cache: EngineCache, tokens: torch.Tensor, decoder_mask: Any, past: Any) -> torch.Tensor:
        state = cache.state
        assert state is not None
        count = tokens.shape[1]
        longest = self.runtime_config.max_target_tokens
        check_length("target", state.length + count, longest, self.architecture.longest_target)
        key_mask = None
        if decoder_mask is not None:
            total = state.length + count
            key_mask = check_mask("decoder_attention_mask", decoder_mask, len(tokens), total, tokens.device)
            key_mask = None if bool(key_mask.all()) else key_mask
        logits = self._opened().decode(state, tokens, key_mask)
        if past is not None and past is not cache:  # a stock cache is written in place, as the stock class does
            write_stock(past, state, count)
        return logits


def _version_of(mask: Any) -> tuple[Any, int] | None:
    """What tells whether a mask is the same and unchanged; None for inference tensors, which count no versions."""
    tracked = not (isinstance(mask, torch.Tensor) and mask.is_inference())
    return (mask, getattr(mask, "_version", 0)) if tracked else None
