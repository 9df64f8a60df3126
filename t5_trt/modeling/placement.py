"""Devices and dtypes of a model on engines.

The device is chosen when the model is loaded. On a CPU the dtype is the parameters', as in the Hugging Face class: engines compute in
float32 from the parameters as they are, and results are returned in their dtype. On a GPU it is the engines' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from t5_trt.errors import BackendError
from t5_trt.runtime.select import refusal_of_device
from t5_trt.validation import PRECISION_OF, as_dtype

if TYPE_CHECKING:
    from t5_trt.modeling.runner import ModelRunner


class PlacedModel:
    """The part of `t5_trt.modeling.base.EngineModel` that replaces nn.Module's moves and conversions."""

    if TYPE_CHECKING:  # Transformers evaluates annotations
        _runner: ModelRunner

    @property
    def device(self) -> torch.device:
        """Where inputs are expected and outputs appear."""
        return self._runner.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states, and on a CPU of logits; on a GPU logits are float32."""
        return self._runner.dtype

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
        """Called for every conversion of this model and of modules that contain it.

        Raises:
            BackendError, InputError: see `to`.
        """
        before = torch.empty(1, dtype=self.dtype, device=self._runner.table.device)
        after = fn(before)
        moves, converts = after.device != before.device, after.dtype is not before.dtype
        if converts:
            as_dtype(after.dtype)
        if moves and not (after.is_meta or before.is_meta):
            self._check_device(after.device)
        if moves or converts:
            self._runner.session = None  # frees its memory now; the next call notices other changes
        if self._runner.placement.backend == "onnxruntime" or after.is_meta or not (moves or converts):
            return super()._apply(fn, recurse)  # type: ignore[misc]
        if converts:  # the parameters stay on the host: engines are made from them
            self._runner.choose_precision(PRECISION_OF[after.dtype])
        return self

    def extra_repr(self) -> str:
        """The first line of the model's repr: backend, precision, decoder step, loaded engines and memory of their weights."""
        placement, session = self._runner.placement, self._runner.session
        graphs = "none opened yet" if session is None else ", ".join(session.loaded_graphs()) or "none loaded yet"
        read = "the parameters' memory" if self.dtype is torch.float32 else "copies of the parameters in float32"
        own = f"{session.weight_bytes / 1e6:.1f} MB on {placement.device}" if session and session.weight_bytes else read
        what = f"backend={placement.backend}, precision={placement.precision}"
        decode = "" if self._runner.encoder_only else f", decode={placement.decode}"
        return f"{what}{decode}, engines=({graphs}), weights=({own})"

    def _check_device(self, device: torch.device) -> None:
        placement = self._runner.placement
        if device.type != placement.device.type or device.index not in (None, placement.device.index):
            raise BackendError(refusal_of_device(device, placement, self._runner.settings.runtime.flavor))
