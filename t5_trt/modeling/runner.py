"""Runs one model: its session and other objects derived from its weights and settings, and the encoder and decoder passes.

A public model holds a `ModelRunner`, and so does an encoder whose model is gone. It is not part of the model's state: copies and
unpickled models create their own.
"""

from __future__ import annotations

import copy
import logging
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from t5_trt.checkpoint.families import read_architecture
from t5_trt.checkpoint.load import check_tensors, scales_decoder_output, without_data
from t5_trt.config import BuildConfig, RuntimeConfig
from t5_trt.errors import InputError, StrictModeError
from t5_trt.generation.encoder_output import EngineEncoderOutput
from t5_trt.generation.kv_cache import EngineCache, append_to_hugging_face
from t5_trt.generation.open_cache import decode, open_cache
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling, Ranges
from t5_trt.graph.parameters import EMBEDDING, HEAD, step_matrices
from t5_trt.modeling.adapted_model import engine_weights, hugging_face_twin
from t5_trt.modeling.adapter_layers import adapter_layers, base_layer, has_own_rows
from t5_trt.modeling.adapters import AdaptedWeights, base_weights
from t5_trt.modeling.calibration import observe, random_batches
from t5_trt.modeling.fallback import why_beyond_engines
from t5_trt.modeling.generation_context import generation_of
from t5_trt.modeling.gradients import Replay, with_gradients
from t5_trt.modeling.inputs import ForwardInputs
from t5_trt.modeling.layer_checks import check_layers
from t5_trt.modeling.reference import follow, make_reference
from t5_trt.modeling.weight_tracker import WeightWatch
from t5_trt.runtime.forks import abandon
from t5_trt.runtime.open_session import choose_fp16_scaling, open_session
from t5_trt.runtime.select import Placement, resolve
from t5_trt.runtime.session import Session

logger = logging.getLogger("t5_trt")


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Disable gradients and inference mode.

    Buffers outlive the call. Inference tensors could not be written to outside of ``torch.inference_mode()``, and have no version
    counter, by which changed encoder states are noticed.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class ModelSettings:
    """How a model runs.

    Attributes:
        runtime: the user's settings.
        build: settings of the engine builder.
        placement: what `runtime` resolves to on this machine; None until it is needed.
        calibration: batches whose largest activations set the range of half precision; None derives it from the weights.
    """

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    placement: Placement | None = None
    calibration: list[Any] | None = None


class ModelRunner:
    """The session, the architecture and the Hugging Face model of one model, and the passes that use them.

    Args:
        model: a module tree of `hf_class`, held by a weak reference because it holds the runner: so GPU memory is freed when the model
            is deleted, not at the next garbage collection.
        hf_class: the Hugging Face class of the model's family.
        settings: how it runs.

    Attributes:
        session: engines over the weights as they were when it was opened; None before.
        lock: held while ``generate()`` runs, and while adapters update the engines' weights.
    """

    def __init__(self, model: PreTrainedModel, hf_class: type[PreTrainedModel], settings: ModelSettings) -> None:
        self._model = weakref.ref(model)
        self.hf_class, self.settings = hf_class, settings
        self.encoder_only = not hasattr(model, "decoder")
        self.session: Session | None = None
        self._session_weights: WeightWatch | None = None
        self._reference: PreTrainedModel | None = None
        self._reference_weights: WeightWatch | None = None
        self._architecture: Architecture | None = None
        self._adapted: AdaptedWeights | None = None
        self.lock = threading.RLock()

    @property
    def model(self) -> Any:
        """The model."""
        return self._model()

    @property
    def table(self) -> torch.Tensor:
        """The embedding without adapters; its device and dtype stand for those of all parameters."""
        table: torch.Tensor = base_layer(self.model.shared).weight
        return table

    @property
    def placement(self) -> Placement:
        """Backend, precision and device."""
        if self.settings.placement is None:
            self.settings = replace(self.settings, placement=self._resolve(self.settings.runtime))
        placement = self.settings.placement
        assert placement is not None
        return placement

    def _resolve(self, runtime: RuntimeConfig) -> Placement:
        return resolve(runtime, None if self.encoder_only else self.model.config)

    def choose_precision(self, precision: str) -> None:
        """Change the precision; the backend is chosen again."""
        runtime = replace(self.settings.runtime, precision=precision)
        self.settings = replace(self.settings, runtime=runtime, placement=self._resolve(runtime))

    @property
    def device(self) -> torch.device:
        """Where inputs are expected and outputs appear."""
        return torch.device("meta") if self.table.is_meta else self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states, and on a CPU of logits; on a GPU logits are float32."""
        placement = self.placement
        dtype: torch.dtype = placement.dtype if placement.backend != "onnxruntime" else self.table.dtype
        return dtype

    @property
    def architecture(self) -> Architecture:
        """Sizes and switches of the model, read from its config and tensors once."""
        if self._architecture is not None:
            return self._architecture
        model, kind = self.model, self.hf_class
        state, changing = base_weights(model)
        expected = without_data(kind, copy.deepcopy(model.config))
        check_tensors(state, expected.state_dict(), kind)
        check_layers(model, expected)
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        tied = getattr(model, "lm_head", model.shared).weight.data_ptr() == model.shared.weight.data_ptr()
        tied = tied and changing.isdisjoint((EMBEDDING, HEAD))
        scaled = not self.encoder_only and scales_decoder_output(kind, model.config)
        facts = {"tied_head": tied, "scaled_head": scaled, "encoder_only": self.encoder_only}
        self._architecture = read_architecture(model.config, shapes, **facts)
        return self._architecture

    def notice_changes(self) -> None:
        """Drop engines if the weights have changed since they were opened; skipped within a ``generate()``, which has checked.

        Raises:
            InputError: the parameters hold no values.
        """
        if generation_of(self) is not None:
            return
        if self.session is None:
            if self.table.is_meta:
                raise InputError(
                    "the model's parameters are on the device meta and hold no values. Load it with from_pretrained(), or load "
                    "weights into it: load_state_dict(..., assign=True)."
                )
        elif self._session_weights is not None and self._session_weights.changed() and not self._follow_adapters():
            logger.info("the model's weights have changed: its engines are opened anew")
            self.session = self._architecture = None

    def opened(self) -> Session:
        """The session; call `notice_changes` first."""
        if self.session is None:
            with ordinary_tensors():  # adapters may write into its weights in any mode
                self.session = self._open()
        return self.session

    def _open(self) -> Session:
        model, settings, self._architecture = self.model, self.settings, None
        architecture = self.architecture  # refuses tensors that are others
        weights = engine_weights(model)
        self._session_weights, self._adapted = WeightWatch(model), None
        options: dict[str, Any] = {"calibrated": settings.calibration is not None}
        on_host = self.placement.backend == "onnxruntime"
        if isinstance(weights, AdaptedWeights):
            self._adapted = weights
            weights.check()
            options |= {"changing": weights.changing, "base": weights.base}
            if on_host:
                weights.keep()
        kept = step_matrices(architecture) if on_host and self.placement.precision == "bf16" else set()
        read = in_float32(weights, kept - {EMBEDDING}) if on_host else weights
        session = open_session(
            architecture, read, settings.runtime, self.placement, settings.build, self.observe, **options
        )
        scaling = session.scaling
        if self._adapted is not None and scaling is not None:
            self._adapted.fp16_scaling(self._session_weights.state, lambda: scaling)
        return session

    def rows_have_adapters(self) -> bool:
        """Whether each row of the batch chooses its adapter (peft's ``adapter_names``)."""
        if self.session is None:
            return has_own_rows(adapter_layers(self.model))
        return self._adapted is not None and has_own_rows(self._adapted.layers)

    def _follow_adapters(self) -> bool:
        """Update the open session if only adapters have changed."""
        adapted, watch, session = self._adapted, self._session_weights, self.session
        if adapted is None or watch is None or session is None:
            return False
        with self.lock, ordinary_tensors():
            try:
                if adapted.base_changed():
                    return False
                renewed = watch.renewed() or WeightWatch(self.model)
                if watch.stepped:
                    adapted.forget_scalings()
                if not self._same_scaling(adapted, session, renewed):
                    return False
                followed = session.update_weights(adapted.follow(session.device))
            except BaseException:  # some weights are updated and some are not
                self.session = None
                raise
            self._session_weights = renewed
        return followed

    def _same_scaling(self, adapted: AdaptedWeights, session: Session, watch: WeightWatch) -> bool:
        """Whether the fp16 factors of a session fit the current weights."""
        if session.scaling is None:
            return True
        precision = self.placement.precision
        wanted = adapted.fp16_scaling(watch.state, lambda: self._choose_scaling(adapted.on(session.device), precision))
        return bool(wanted == session.scaling)

    def drop(self) -> None:
        """Drop everything derived from the weights, which are about to change."""
        self.session = self._reference = self._architecture = None

    def leave_to_parent(self) -> None:
        """In a forked process: abandon the parent's engines; the next use opens new ones."""
        abandon(self.session)
        self.session, self.lock = None, threading.RLock()

    def fp16_scaling(self, precision: str) -> Fp16Scaling:
        """Factors folded into the weights of engines of a precision, see `t5_trt.graph.fp16_scaling`."""
        return self._choose_scaling(engine_weights(self.model), precision)

    def _choose_scaling(self, weights: Mapping[str, torch.Tensor], precision: str) -> Fp16Scaling:
        calibrated = self.settings.calibration is not None
        return choose_fp16_scaling(self.architecture, weights, precision, self.observe, calibrated=calibrated)

    def observe(self) -> Ranges:
        """The largest activations for the calibration texts, or for random tokens where there are none."""
        batches = self.settings.calibration or random_batches(self.architecture.vocab_size)
        return observe(hugging_face_twin(self.model, self.hf_class), batches)

    def reference(self) -> PreTrainedModel:
        """The Hugging Face model over the same weights, with eager attention; created at the first use.

        Raises:
            StrictModeError: the model was loaded with ``strict=True``.
        """
        if self.settings.runtime.strict:
            raise StrictModeError("strict=True: the Hugging Face model is not used. Load with strict=False to have it.")
        model, made, weights = self.model, self._reference, self._reference_weights
        if weights is not None and (weights.replaced() if self.device.type == "cpu" else weights.changed()):
            made = None
        if made is None:
            self._reference_weights = WeightWatch(model)
            made = self._reference = make_reference(model, self.hf_class, self.device)
        if hasattr(model, "generation_config"):
            made.generation_config = model.generation_config
        follow(made, model)
        return made

    def fall_back(self, reason: str) -> PreTrainedModel:
        """`reference` for a request that engines cannot serve; warns once.

        Raises:
            StrictModeError: the model was loaded with ``strict=True``.
        """
        if self.settings.runtime.strict:
            raise StrictModeError(
                f"strict=True: the request needs {reason}, which engines cannot give. Leave it out, or load the model with "
                "strict=False to have the Hugging Face model serve it."
            )
        if self._reference is None:
            hint = "; under torch.no_grad() engines serve it" if reason == "gradients" else ""
            logger.warning("%s is served by the Hugging Face model (model.reference), at its speed%s.", reason, hint)
        return self.reference()

    def why_not_engines(self, inputs: ForwardInputs) -> str | None:
        """Why engines cannot serve a request, or None if they can."""
        return why_beyond_engines(inputs, self.model, self.device, strict=self.settings.runtime.strict,
                                  generating=generation_of(self) is not None, adapted_rows=self.rows_have_adapters())  # fmt: skip

    def encode(self, inputs: ForwardInputs) -> EngineEncoderOutput:
        """Run the encoder engine.

        Returns:
            last_hidden_state [B, S, E], with the decoder's cross-attention K/V attached.

        Raises:
            InputError: an input has a wrong type, dtype, shape or value.
        """
        session, generation = self.opened(), generation_of(self)
        checked = inputs.for_encoder(self.architecture, self.settings.runtime, session.device)
        rows_per_source = None if generation is None else generation.rows_per_source
        with ordinary_tensors():
            states, cross = session.encode(checked.ids, checked.embeds, checked.mask, rows_per_source)
        states = self._in_own_dtype(states)
        if torch.is_grad_enabled():
            states = self._with_gradients("encoder", states, (checked.source, checked.mask))
        output = EngineEncoderOutput(last_hidden_state=states)  # type: ignore[arg-type]
        return output.remember(cross, session, inputs.attention_mask, checked.mask)

    def decode(self, inputs: ForwardInputs, tokens: torch.Tensor, encoded: Any) -> tuple[Any, torch.Tensor]:
        """Run the decoder engine.

        Args:
            inputs: the masks and the cache.
            tokens: int64 [R, Q], the new tokens.
            encoded: first entry [B, S, E].

        Returns:
            The cache with the new tokens (the caller's, if one was given), and logits [R, Q, V].

        Raises:
            InputError: these do not fit each other.
        """
        session, given = self.opened(), inputs.cache
        with ordinary_tensors():
            cache = open_cache(session, given, encoded, inputs.attention_mask, len(tokens))
            longest = self.settings.runtime.max_target_tokens
            logits = decode(session, cache, tokens, inputs.decoder_attention_mask, longest)
            cache.dtype = self.dtype
            if given is not None and given is not cache:  # written in place, as the Hugging Face class does
                append_to_hugging_face(given, cache, tokens.shape[1])
        logits = self._in_own_dtype(logits)
        if torch.is_grad_enabled():
            read = (inputs.attention_mask, tokens, inputs.decoder_attention_mask)
            logits = self._with_gradients("decoder", logits, read, encoded[0], cached=given is not None)
        return cache if given is None else given, logits

    def open_cache(self, cache: EngineCache, encoded: Any, attention_mask: Any, prompt: torch.Tensor) -> Session:
        """Open an empty cache over an encoder's output for a prompt, int64 [R, tokens]; return the session that made it.

        Raises:
            InputError: these do not fit each other.
        """
        cache.capacity_tokens, cache.dtype = prompt.shape[1], self.dtype
        session = self.opened()
        open_cache(session, cache, encoded, attention_mask, len(prompt))
        return session

    def _in_own_dtype(self, result: torch.Tensor) -> torch.Tensor:
        """Convert a result of engines (float32 on a CPU) to the model's dtype."""
        return result.to(self.dtype) if self.placement.backend == "onnxruntime" else result

    def _with_gradients(self, part: str, result: torch.Tensor, *inputs: Any, cached: bool = False) -> torch.Tensor:
        if self._session_weights is None:  # the user assigned the session
            self._session_weights = WeightWatch(self.model)
        return with_gradients(result, Replay(self.model, self, part, self._session_weights, cached), *inputs)


def in_float32(weights: Mapping[str, torch.Tensor], kept: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Weights for ONNX Runtime: float32 tensors themselves, float32 copies of others, but for bfloat16 ones that are `kept`."""
    copies: dict[Any, torch.Tensor] = {}
    places = {key: (tensor.data_ptr(), tensor.shape) for key, tensor in weights.items()}
    for key, place in places.items():
        if place not in copies:
            weight = weights[key].detach()
            copies[place] = weight if key in kept and weight.dtype == torch.bfloat16 else weight.float()
    return {key: copies[place] for key, place in places.items()}
