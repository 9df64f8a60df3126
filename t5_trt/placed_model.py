"""Devices and dtypes of a model on engines: where it runs is chosen when it is loaded, and moves are wishes."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from t5_trt.config import RuntimeConfig
from t5_trt.errors import BackendError
from t5_trt.inputs import PRECISION_OF, as_dtype
from t5_trt.runtime.open import Placement, refusal_of_device, resolve
from t5_trt.runtime.session import Session

logger = logging.getLogger("t5_trt")


class PlacedModel:
    """The part of `t5_trt.engine_model.EngineModel` that stands for nn.Module's moves."""

    _runtime_config: RuntimeConfig
    _placement_: Placement | None
    _session: Session | None

    @property
    def device(self) -> torch.device:
        """Where inputs are expected and outputs appear."""
        return self._placement.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states; logits are always float32."""
        return self._placement.dtype

    @property
    def _placement(self) -> Placement:
        if self._placement_ is None:
            self._placement_ = resolve(self._runtime_config)
        return self._placement_

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Accepts what ``nn.Module.to`` takes. A device that the backend cannot use is refused; see `half` for dtypes.

        Raises:
            BackendError: the backend does not run on that device.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and (device.type != self.device.type or device.index not in (None, self.device.index)):
            raise BackendError(refusal_of_device(device, self._placement, self._runtime_config.flavor))
        if dtype is not None:
            self._wish_dtype(dtype)
        return self

    def cuda(self, device: int | torch.device | None = None) -> Any:  # type: ignore[override]
        """Like ``to("cuda")``."""
        return self.to("cuda" if device is None else f"cuda:{device}" if isinstance(device, int) else device)

    def cpu(self) -> Any:
        """Like ``to("cpu")``."""
        return self.to("cpu")

    def float(self, *args: Any) -> Any:
        """Keep float32."""
        return self

    def half(self, *args: Any) -> Any:
        """A wish: ONNX Runtime computes in float32 on the CPU and says so once."""
        return self.to(torch.float16)

    def bfloat16(self, *args: Any) -> Any:
        """A wish: ONNX Runtime computes in float32 on the CPU and says so once."""
        return self.to(torch.bfloat16)

    def _wish_dtype(self, dtype: Any) -> None:
        dtype = as_dtype(dtype)
        if dtype is self.dtype or dtype is torch.float32:
            return
        if self._placement.backend == "tensorrt" and self._session is None:
            self._runtime_config = replace(self._runtime_config, precision=PRECISION_OF[dtype])
            self._placement_ = None
        else:
            logger.warning(
                "the backend %r computes in %s here; dtype %s is not used. Choose the precision when loading.",
                self._placement.backend,
                self._placement.precision,
                dtype,
            )
