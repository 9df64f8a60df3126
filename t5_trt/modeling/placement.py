"""Devices and dtypes of a model on engines.

The device is chosen when the model is loaded. On a CPU the dtype is the parameters', as in the Hugging Face class: engines compute in
float32 from the parameters as they are, and results are returned in their dtype. On a GPU it is the engines' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from t5_trt.config import BuildConfig, RuntimeConfig
from t5_trt.errors import BackendError, InputError
from t5_trt.modeling.adapter_layers import base_layer
from t5_trt.modeling.encoder import attach_encoder
from t5_trt.runtime.select import Placement, refusal_of_device, resolve
from t5_trt.runtime.session import Session
from t5_trt.validation import PRECISION_OF, as_dtype


class PlacedModel:
    """The part of `t5_trt.modeling.base.EngineModel` that stands for nn.Module's moves."""

    _runtime_config: RuntimeConfig
    _build_config: BuildConfig
    _placement_: Placement | None
    _session: Session | None
    _encoder_only: bool
    config: Any
    shared: Any

    @property
    def _table(self) -> torch.Tensor:
        """The embedding, which stands for all parameters; without its adapters, which would compute another one."""
        table: torch.Tensor = base_layer(self.shared).weight
        return table

    @property
    def device(self) -> torch.device:
        """Where inputs are expected and outputs appear."""
        return torch.device("meta") if self._table.is_meta else self._placement.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states; on a CPU of logits, too, which on a GPU are float32."""
        if self._placement.backend != "onnxruntime":
            return self._placement.dtype
        dtype: torch.dtype = self._table.dtype
        return dtype

    @property
    def _placement(self) -> Placement:
        if self._placement_ is None:
            self._placement_ = resolve(self._runtime_config, self._decoder_config)
        return self._placement_

    @property
    def _decoder_config(self) -> Any:
        """The config of a model with a decoder, else None."""
        return None if self._encoder_only else self.config

    def _configure(self, runtime: RuntimeConfig, build: BuildConfig, placement: Placement | None = None) -> None:
        """Set how the model runs."""
        self._runtime_config, self._build_config, self._placement_ = runtime, build, placement
        attach_encoder(self)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Convert as ``nn.Module.to`` does. A device that the backend cannot use is refused.

        Raises:
            BackendError: the backend does not run on that device.
            InputError: the dtype is not float32, float16 or bfloat16.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        meta = device is not None and device.type == "meta"
        if device is not None and not meta:
            self._check_device(device)
        if not meta and dtype is None:
            return self
        return super().to(device="meta" if meta else None, dtype=dtype)  # type: ignore[misc]

    def cuda(self, device: int | torch.device | None = None) -> Any:  # type: ignore[override]
        """Like ``to("cuda")``."""
        return self.to("cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)

    def cpu(self) -> Any:
        """Like ``to("cpu")``."""
        return self.to("cpu")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What every conversion of this model, and of a module that contains it, goes through.

        Raises:
            BackendError, InputError: see `to`.
        """
        before = torch.empty(1, dtype=self.dtype, device=self._table.device)
        after = fn(before)
        moves, converts = after.device != before.device, after.dtype is not before.dtype
        if converts:
            as_dtype(after.dtype)
        if moves and not (after.is_meta or before.is_meta):
            self._check_device(after.device)
        if moves or converts:
            self._session = None  # frees what it holds at once; other changes are noticed by the next call
        if self._placement.backend == "onnxruntime" or after.is_meta or not (moves or converts):
            return super()._apply(fn, recurse)  # type: ignore[misc]
        if converts:  # the parameters, which engines are made from, stay on the host as they are
            runtime = replace(self._runtime_config, precision=PRECISION_OF[after.dtype])
            self._configure(runtime, self._build_config, resolve(runtime, self._decoder_config))
        return self

    def extra_repr(self) -> str:
        """Backend, precision, who decodes, loaded engines and memory of their weights, at the head of the model's repr."""
        placement, session = self._placement, self._session
        graphs = "none opened yet" if session is None else ", ".join(session.loaded_graphs()) or "none loaded yet"
        read = "the parameters' memory" if self.dtype is torch.float32 else "copies of the parameters in float32"
        own = f"{session.weight_bytes / 1e6:.1f} MB on {placement.device}" if session and session.weight_bytes else read
        what = f"backend={placement.backend}, precision={placement.precision}"
        decode = "" if self._encoder_only else f", decode={placement.decode}"
        return f"{what}{decode}, engines=({graphs}), weights=({own})"

    def _in_own_dtype(self, result: torch.Tensor) -> torch.Tensor:
        """A result of engines, which is float32 on a CPU, in the dtype that the model reports."""
        return result.to(self.dtype) if self._placement.backend == "onnxruntime" else result

    def _check_values(self) -> None:
        if self._table.is_meta:
            raise InputError(
                "the model's parameters are on the device meta and hold no values. Load it with from_pretrained(), or load "
                "weights into it: load_state_dict(..., assign=True)."
            )

    def _check_device(self, device: torch.device) -> None:
        own = self._placement.device
        if device.type != own.type or device.index not in (None, own.index):
            raise BackendError(refusal_of_device(device, self._placement, self._runtime_config.flavor))


def in_float32(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ONNX Runtime computes from: the tensors' own memory where they are float32, else one copy of each."""
    copies: dict[Any, torch.Tensor] = {}
    places = {key: (tensor.data_ptr(), tensor.shape) for key, tensor in weights.items()}
    for key, place in places.items():
        if place not in copies:
            copies[place] = weights[key].detach().float()
    return {key: copies[place] for key, place in places.items()}
