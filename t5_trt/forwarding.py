"""The forward pass, as a mixin over a stock T5 class.

A request goes to the engines unless it asks for something they cannot give (see `_beyond_engines`); that goes to the
stock PyTorch model over the same weights. Nothing here loads, builds or chooses engines.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import ModelOutput

from t5_trt.errors import InputError, StrictModeError
from t5_trt.generation.encoder_output import EngineEncoderOutput, recall
from t5_trt.generation.engine_cache import EngineCache, read_stock, write_stock
from t5_trt.inputs import check_embeds, check_length, check_mask, check_reference_mask, check_token_ids
from t5_trt.runtime.buffers import CrossStates
from t5_trt.runtime.exits import at_work
from t5_trt.transformers_api import CACHE, names_cache_as_stock, takes_old_cache_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from t5_trt.architecture import Architecture
    from t5_trt.config import RuntimeConfig
    from t5_trt.runtime.session import Session

logger = logging.getLogger("t5_trt")


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """No gradients, and no inference tensors either.

    Buffers outlive the call: made under ``torch.inference_mode()`` they could not be written to outside of it, and
    would not count their versions, by which changed encoder states are noticed.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class EngineForward:
    """`forward` on engines; mixed in before a stock ForConditionalGeneration class."""

    _calls: threading.local  # what is running in each thread

    if TYPE_CHECKING:
        config: Any
        generation_config: Any
        training: bool
        encoder: Any
        _shift_right: Any

        @property
        def device(self) -> torch.device: ...  # noqa: D102 - see modeling.py
        @property
        def runtime_config(self) -> RuntimeConfig: ...  # noqa: D102
        @property
        def architecture(self) -> Architecture: ...  # noqa: D102
        def _opened(self) -> Session: ...
        @property
        def dtype(self) -> torch.dtype: ...  # noqa: D102
        def _notice_changes(self) -> None: ...
        def _in_own_dtype(self, result: torch.Tensor) -> torch.Tensor: ...
        def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102
        @property
        def reference(self) -> PreTrainedModel: ...  # noqa: D102

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
        loss = None
        if labels is not None:
            target = labels.to(logits.device).flatten()
            loss = self._in_own_dtype(nn.functional.cross_entropy(logits.flatten(0, 1), target, ignore_index=-100))
        result = Seq2SeqLMOutput(
            loss=loss,
            logits=self._in_own_dtype(logits),
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
        check_length("source", length, self.runtime_config.max_source_tokens)
        mask = check_mask("attention_mask", attention_mask, batch, length, session.device)
        with ordinary_tensors():
            hidden, cross = session.encode(input_ids, inputs_embeds, mask, self._beams_ahead)
            hidden = self._in_own_dtype(hidden)
            return EngineEncoderOutput(last_hidden_state=hidden).remember(cross, session)  # type: ignore[arg-type]

    @property
    def _beams_ahead(self) -> int | None:
        """Decoder rows of each batch entry in the ``generate()`` that is running in this thread; None outside of one."""
        return getattr(self._calls, "beams", None)

    def _wanted_outputs(self, output_attentions: bool | None, output_hidden_states: bool | None) -> dict[str, Any]:
        """Which inner values a caller wants: what was said, else what the config says."""
        said = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        return {name: getattr(self.config, name, False) if value is None else value for name, value in said.items()}

    def _beyond_engines(
        self,
        wanted: dict[str, Any],
        attention_mask: Any,
        decoder_attention_mask: Any,
        decoder_inputs_embeds: Any,
        inputs_embeds: Any,
        encoder_outputs: Any = None,
        labels: Any = None,
    ) -> str | None:
        """Why engines cannot serve a request, or None if they can."""
        for name, value in wanted.items():
            if value:
                return name
        if decoder_inputs_embeds is not None:
            return "decoder_inputs_embeds"
        for name, mask in (("attention_mask", attention_mask), ("decoder_attention_mask", decoder_attention_mask)):
            if isinstance(mask, torch.Tensor) and mask.dim() > 2:
                return f"a {mask.dim()}-D {name}"
        given = None if encoder_outputs is None else encoder_outputs[0]
        wants_gradients = any(getattr(source, "requires_grad", False) for source in (inputs_embeds, given))
        if wants_gradients and torch.is_grad_enabled():
            return "gradients"
        if self._beams_ahead is not None:
            return None
        if self.training:  # dropout, which Monte Carlo dropout wants without gradients, too
            if labels is not None and torch.is_grad_enabled() and self.device.type != "cpu":
                raise InputError(
                    f"training got a model on {self.device}, whose gradients would not reach its parameters, which are on the CPU; "
                    "expected the stock class. Train that, then use from_model() or save_pretrained(); or call eval()."
                )
            return "training mode"
        if labels is None or self.runtime_config.strict or self.device.type != "cpu" or not torch.is_grad_enabled():
            return None
        return "gradients" if any(weight.requires_grad for weight in self.parameters()) else None

    def _checked_for_reference(
        self, input_ids: Any, decoder_input_ids: Any, attention_mask: Any, decoder_mask: Any = None, cache: Any = None
    ) -> tuple[Any, Any, Any, Any]:
        """Token ids (int64) and masks for the stock model, after the checks that the engines' inputs get."""
        size, heads = self.architecture.vocab_size, self.architecture.num_heads
        given = (("input_ids", input_ids), ("decoder_input_ids", decoder_input_ids))
        source, target = (None if ids is None else check_token_ids(name, ids, size, self.device) for name, ids in given)
        if source is not None and target is not None and len(source) not in (1, len(target)):
            raise InputError(
                f"decoder_input_ids has {len(target)} rows and input_ids {len(source)}; expected the same number."
            )
        attending, alone = [ids for ids in (source, target) if ids is not None], target if cache is None else None
        mask = check_reference_mask("attention_mask", attention_mask, heads, attending, source, self.device)
        name, queries = "decoder_attention_mask", [] if target is None else [target]
        decoder_mask = check_reference_mask(name, decoder_mask, heads, queries, alone, self.device)
        return source, target, mask, decoder_mask

    def _use_reference(self, reason: str) -> PreTrainedModel:
        if self.runtime_config.strict:
            raise StrictModeError(
                f"strict=True: the request needs {reason}, which engines cannot give. Leave it out, or load the model with "
                "strict=False to have the stock PyTorch model serve it."
            )
        if getattr(self, "_reference", None) is None:
            hint = "; under torch.no_grad() engines serve it" if reason == "gradients" else ""
            logger.warning("%s is served by the stock PyTorch model (model.reference), at its speed%s.", reason, hint)
        return self.reference

    def _check_labels(self, labels: Any) -> torch.Tensor:
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            raise InputError(
                f"labels got {getattr(labels, 'dtype', type(labels).__name__)}; expected int64 [batch, tokens]."
            )
        kept = labels.masked_fill(labels == -100, 0)
        check_token_ids("labels", kept, self.architecture.vocab_size, labels.device)
        return labels.long()

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
            cache.state, cache.dtype = session.start(cross, capacity, mask), self.dtype
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
        check_length("target", state.length + count, self.runtime_config.max_target_tokens)
        key_mask = None
        if decoder_mask is not None:
            total = state.length + count
            key_mask = check_mask("decoder_attention_mask", decoder_mask, len(tokens), total, tokens.device)
            key_mask = None if bool(key_mask.all()) else key_mask
        logits = self._opened().decode(state, tokens, key_mask)
        if past is not None and past is not cache:  # a stock cache is written in place, as the stock class does
            write_stock(past, state, count, self.dtype)
        return logits


def _version_of(mask: Any) -> tuple[Any, int] | None:
    """What tells whether a mask is the same and unchanged; None for inference tensors, which count no versions."""
    tracked = not (isinstance(mask, torch.Tensor) and mask.is_inference())
    return (mask, getattr(mask, "_version", 0)) if tracked else None
