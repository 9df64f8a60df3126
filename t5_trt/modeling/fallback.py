"""Requests that engines cannot serve: which they are, their checks, and the Hugging Face model that serves them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from t5_trt.errors import InputError, StrictModeError
from t5_trt.modeling.gradients import comes_from_engine
from t5_trt.validation import check_reference_mask, check_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from t5_trt.config import RuntimeConfig
    from t5_trt.graph.architecture import Architecture

logger = logging.getLogger("t5_trt")


class ReferenceFallback:
    """The part of `t5_trt.modeling.forward.EngineForward` that sends requests to the Hugging Face model."""

    _calls: threading.local  # what is running in each thread

    if TYPE_CHECKING:
        config: Any
        generation_config: Any
        training: bool

        @property
        def device(self) -> torch.device: ...  # noqa: D102 - see modeling.py
        @property
        def runtime_config(self) -> RuntimeConfig: ...  # noqa: D102
        @property
        def architecture(self) -> Architecture: ...  # noqa: D102
        def _rows_have_adapters(self) -> bool: ...
        def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102
        @property
        def reference(self) -> PreTrainedModel: ...  # noqa: D102

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
        if self._rows_have_adapters():
            return "adapter_names"
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
        if wants_gradients and torch.is_grad_enabled() and not comes_from_engine(given):
            return "gradients"
        if self._beams_ahead is not None:
            return None
        if self.training:  # dropout, which Monte Carlo dropout wants without gradients, too
            if labels is not None and torch.is_grad_enabled() and self.device.type != "cpu":
                raise InputError(
                    f"training got a model on {self.device}, whose gradients would not reach its parameters, which are on the CPU; "
                    "expected the Hugging Face class. Train that, then use from_model() or save_pretrained(); or call eval()."
                )
            return "training mode"
        if labels is None or self.runtime_config.strict or self.device.type != "cpu" or not torch.is_grad_enabled():
            return None
        return "gradients" if any(weight.requires_grad for weight in self.parameters()) else None

    def _checked_for_reference(
        self, input_ids: Any, decoder_input_ids: Any, attention_mask: Any, decoder_mask: Any = None, cache: Any = None
    ) -> tuple[Any, Any, Any, Any]:
        """Token ids (int64) and masks for the Hugging Face model, after the checks that the engines' inputs get."""
        size, heads = self.architecture.vocab_size, self.architecture.num_heads
        given = (("input_ids", input_ids), ("decoder_input_ids", decoder_input_ids))
        source, target = (None if ids is None else check_token_ids(name, ids, size, self.device) for name, ids in given)
        if source is not None and target is not None and len(source) not in (1, len(target)):
            raise InputError(
                f"decoder_input_ids has {len(target)} rows and input_ids {len(source)}; expected the same number."
            )
        attending = [ids for ids in (source, target) if ids is not None]
        of_four_axes = getattr(decoder_mask, "ndim", 0) == 4  # one of two axes may have another width
        alone = target if cache is None and of_four_axes else None
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

    def _shift_right(self, input_ids: torch.Tensor) -> torch.Tensor:
        for name in ("decoder_start_token_id", "pad_token_id"):  # T5Config need not have the first
            if getattr(self.config, name, None) is None:
                raise InputError(
                    f"labels got no decoder_input_ids, and the config has no {name} to make them with. Set model.config.{name} (T5 "
                    "starts with the padding token, 0), or pass decoder_input_ids."
                )
        shifted: torch.Tensor = super()._shift_right(input_ids)  # type: ignore[misc]
        return shifted
