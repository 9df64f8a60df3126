"""Models with peft adapters: loading them, the weights that engines get, and the Hugging Face model that saves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from t5_trt.checkpoint.load import share_weights
from t5_trt.modeling.adapter_layers import adapter_layers
from t5_trt.modeling.adapters import AdaptedWeights
from t5_trt.modeling.reference import make_reference


class AdapterLoading:
    """The part of `t5_trt.modeling.base.EngineModel` that loads adapters."""

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' ``load_adapter``. The weights stay on the host with the parameters, whatever device the engines use."""
        known = self.__dict__.get("hf_device_map")
        self.__dict__["hf_device_map"] = {"": "cpu"}
        try:
            return super().load_adapter(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__["hf_device_map"] = known
            if known is None:
                del self.__dict__["hf_device_map"]


def engine_weights(model: Any) -> Mapping[str, torch.Tensor]:
    """State-dict key of the Hugging Face class -> tensor, adapters included."""
    return AdaptedWeights(model) if adapter_layers(model) else model.state_dict()  # type: ignore[no-any-return]


def hugging_face_twin(model: Any, hf_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A model of the Hugging Face class that shares the parameters and adapters; for saving and for measuring ranges."""
    if not adapter_layers(model):
        return share_weights(hf_class, model)  # type: ignore[no-any-return]
    twin = make_reference(model, hf_class, torch.device("cpu"))
    for name in ("_hf_peft_config_loaded", "peft_config"):
        if name in model.__dict__:
            twin.__dict__[name] = model.__dict__[name]
    return twin
