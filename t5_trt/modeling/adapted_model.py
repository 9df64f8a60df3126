"""What a model on engines does about adapters of peft: whose weights its engines get, and how they follow."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from t5_trt.checkpoint.load import share_weights
from t5_trt.config import BuildConfig, RuntimeConfig
from t5_trt.graph.fp16_scaling import Folding, Ranges
from t5_trt.modeling.adapter_layers import adapter_layers, has_own_rows
from t5_trt.modeling.adapters import AdaptedWeights
from t5_trt.modeling.calibration import observe, random_batches
from t5_trt.modeling.forward import ordinary_tensors
from t5_trt.modeling.placement import in_float32
from t5_trt.modeling.reference import make_reference
from t5_trt.modeling.weight_tracker import WeightWatch
from t5_trt.runtime.open_session import choose_folding, open_session

if TYPE_CHECKING:
    from t5_trt.graph.architecture import Architecture
    from t5_trt.runtime.select import Placement
    from t5_trt.runtime.session import Session


class AdaptedModel:
    """The part of `t5_trt.modeling.base.EngineModel` that knows of adapters."""

    _adapted: AdaptedWeights | None  # of the open session
    _session: Any
    _session_weights: WeightWatch | None
    _calibration: list[Any] | None
    _runtime_config: RuntimeConfig
    _build_config: BuildConfig

    if TYPE_CHECKING:
        _generation_lock: threading.RLock
        _stock_class: Any

        @property
        def architecture(self) -> Architecture: ...  # noqa: D102 - see modeling/base.py
        @property
        def _placement(self) -> Placement: ...

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' ``load_adapter``. The weights go where the parameters are, on the host, whatever the device of the engines is."""
        known = self.__dict__.get("hf_device_map")
        self.__dict__["hf_device_map"] = {"": "cpu"}
        try:
            return super().load_adapter(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__["hf_device_map"] = known
            if known is None:
                del self.__dict__["hf_device_map"]

    def _open(self) -> Session:
        """Open a session over the weights as they are now."""
        model: Any = self
        model._architecture = None
        architecture = self.architecture  # refuses tensors that are others
        weights = self._engine_weights()
        self._session_weights, self._adapted = WeightWatch(model), None
        options: dict[str, Any] = {"calibrated": self._calibration is not None}
        on_host = self._placement.backend == "onnxruntime"
        if isinstance(weights, AdaptedWeights):
            self._adapted = weights
            weights.check()
            options |= {"changing": weights.changing, "base": weights.base}
            if on_host:
                weights.keep()
        read = in_float32(weights) if on_host else weights
        settings = (self._runtime_config, self._placement, self._build_config)
        session = open_session(architecture, read, *settings, self._observe, **options)
        if self._adapted is not None and hasattr(session, "folding"):
            self._adapted.folding(self._session_weights.state, lambda: session.folding)
        return session

    def folding(self, precision: str) -> Folding:
        """Factors that engines of a precision have in their weights, see `t5_trt.graph.fp16_scaling`."""
        return self._choose_folding(self._engine_weights(), precision)

    def _engine_weights(self) -> Mapping[str, torch.Tensor]:
        """State-dict key of the Hugging Face class -> tensor, adapters included."""
        model: Any = self
        return AdaptedWeights(model) if adapter_layers(model) else model.state_dict()  # type: ignore[no-any-return]

    def _choose_folding(self, weights: Mapping[str, torch.Tensor], precision: str) -> Folding:
        calibrated = self._calibration is not None
        return choose_folding(self.architecture, weights, precision, self._observe, calibrated=calibrated)

    def _observe(self) -> Ranges:
        batches = self._calibration or random_batches(self.architecture.vocab_size)
        return observe(self._hugging_face_twin(), batches)

    def _hugging_face_twin(self) -> PreTrainedModel:
        """A model of the Hugging Face class over the same parameters, its adapters included; for saving and measuring."""
        model: Any = self
        if not adapter_layers(model):
            return share_weights(self._stock_class, model)  # type: ignore[no-any-return]
        twin = make_reference(model, self._stock_class, torch.device("cpu"))
        for name in ("_hf_peft_config_loaded", "peft_config"):
            if name in model.__dict__:
                twin.__dict__[name] = model.__dict__[name]
        return twin

    def _rows_have_adapters(self) -> bool:
        """Whether peft was given ``adapter_names``, one for each row of the batch."""
        if self._session is None:
            return has_own_rows(adapter_layers(self))  # type: ignore[arg-type]
        return self._adapted is not None and has_own_rows(self._adapted.layers)

    def _follow_adapters(self) -> bool:
        """Bring the open session up to date, where nothing but adapters has changed."""
        adapted, watch = self._adapted, self._session_weights
        if adapted is None or watch is None:
            return False
        with self._generation_lock, ordinary_tensors():
            session: Session = self._session
            try:
                if adapted.base_changed():
                    return False
                renewed = watch.renewed() or WeightWatch(self)  # type: ignore[arg-type]
                if watch.stepped:
                    adapted.forget_foldings()
                if not self._same_folding(adapted, session, renewed):
                    return False
                followed = session.update_weights(adapted.follow(session.device))
            except BaseException:  # some weights are new and some are not
                self._session = None
                raise
            self._session_weights = renewed
        return followed

    def _same_folding(self, adapted: AdaptedWeights, session: Any, watch: WeightWatch) -> bool:
        """Whether the fp16 factors that a session has in its weights are those of the weights as they are now."""
        if not hasattr(session, "folding"):
            return True
        precision = self._placement.precision
        wanted = adapted.folding(watch.state, lambda: self._choose_folding(adapted.on(session.device), precision))
        return bool(wanted == session.folding)
