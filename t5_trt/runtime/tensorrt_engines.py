"""The loaded TensorRT engines of one model: which engine serves a request, loading, checking, binding."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from t5_trt.engine.profiles import Shapes, bucket
from t5_trt.engine.provider import EngineProvider
from t5_trt.engine.tensorrt_api import TensorRT
from t5_trt.errors import BackendError, StrictModeError
from t5_trt.runtime.device_weights import DeviceWeights
from t5_trt.runtime.engine_check import LIMITS, Deviation

logger = logging.getLogger("t5_trt")
Key = tuple[str, Shapes]
#: axis -> the setting that limits it
_SETTINGS = {"B": "max_batch", "N": "max_beams", "S": "max_source_tokens", "T": "max_target_tokens"}


class TrtEngines:
    """Engines and execution contexts by graph and shapes. Not thread-safe: the session's lock guards it.

    Args:
        provider: of plans.
        api: the TensorRT that runs them.
        weights: bound to every engine.
        strict: raise instead of building beyond the configured maxima.
        check: measures the error of a newly built engine; None trusts TensorRT.
    """

    def __init__(
        self,
        provider: EngineProvider,
        api: TensorRT,
        weights: DeviceWeights,
        *,
        strict: bool,
        check: Callable[[str, Shapes], Deviation] | None,
    ) -> None:
        self.api = api
        self.weights = weights
        self._provider = provider
        self._strict = strict
        self._check = check
        self._engines: dict[Key, Any] = {}
        self._contexts: dict[Key, Any] = {}
        self._stored: dict[Key, bool] = {}
        self.built: set[Key] = set()  # built by this process
        self._warned: set[tuple[str, int]] = set()  # axes and sizes beyond the configured maxima

    @property
    def provider(self) -> EngineProvider:
        """Of the plans."""
        return self._provider

    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs that engines are loaded for."""
        return tuple(dict.fromkeys(graph for graph, _ in list(self._engines)))  # another thread may add one

    def bucket(self, **sizes: int) -> Shapes:
        """The bucket of a request, with the axes that were configured as dynamic; one beyond the limits is logged once.

        Raises:
            StrictModeError: it is beyond the configured maxima, and the session is strict.
        """
        limits = self._limits
        for axis, size in sizes.items():
            if size > limits[axis]:
                message = f"a request needs {_SETTINGS[axis]} = {size}; engines were configured for {limits[axis]}"
                if self._strict:
                    raise StrictModeError(f"strict=True: {message}. Raise it in BuildConfig, or send less.")
                served = axis, bucket(axis, size)
                if served not in self._warned:
                    self._warned.add(served)
                    logger.warning("%s: an engine for %d is used.", message, served[1])
        found = {axis: bucket(axis, size) for axis, size in sizes.items()}
        return Shapes(**found, dynamic=self._provider.settings.dynamic)

    def prefetch(self, wanted: Sequence[Key]) -> None:
        """Load engines that will be needed; missing ones are built in parallel."""
        missing = [key for key in (self.key(*want) for want in wanted) if key not in self._engines]
        if len(missing) > 1:
            plans = self._provider.plans(missing)
            for key, plan in zip(missing, plans, strict=True):
                self._engines[key] = self.api.load_engine(plan)
            for key in missing:
                self._verify(key)

    def context(self, graph: str, shapes: Shapes, *, own: bool = False) -> Any:
        """An execution context of the engine that serves a bucket; `own=True` creates a private one.

        Raises:
            BackendError: the engine cannot be built, is wrong, or there is too little GPU memory.
        """
        key = self.load(graph, shapes)
        if own:
            return self.api.new_context(self._engines[key])
        if key not in self._contexts:
            self._contexts[key] = self.api.new_context(self._engines[key])
        return self._contexts[key]

    def load(self, graph: str, shapes: Shapes) -> Key:
        """Load the engine that serves a bucket; build and check it if necessary.

        Raises:
            BackendError: it cannot be built, or is wrong.
        """
        key = self.key(graph, shapes)
        if key not in self._engines:
            self._engines[key] = self.api.load_engine(self._provider.plan(*key))
            self._verify(key)
        return key

    def drop(self, key: Key) -> None:
        """Free the memory of an engine that is currently unused."""
        self._contexts.pop(key, None)
        self._engines.pop(key, None)

    def is_ready(self, graph: str, shapes: Shapes) -> bool:
        """Whether the engine of a bucket exists: it is loaded, or was in the store at the first call."""
        key = self.key(graph, shapes)
        if key not in self._engines and key not in self._stored:
            self._stored[key] = self._provider.has(*key)
        return key in self._engines or self._stored[key]

    def debug_context(self, graph: str, shapes: Shapes) -> Any:
        """A context of an engine that also outputs the residual stream after every block."""
        return self.api.new_context(self.api.load_engine(self._provider.debug_plan(graph, shapes)))

    def write_bundle(self, checkpoint: Path) -> Path:
        """Copy the engines that were used beside a checkpoint."""
        return self._provider.write_bundle(checkpoint)

    def drop_contexts(self) -> None:
        """Free the scratch memory of the shared contexts."""
        self._contexts.clear()

    def bind(self, context: Any, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Set all addresses of a context; `tensors` are inputs and outputs by name; weights are added.

        Returns:
            The weights; the caller keeps them alive while it runs the context.

        Raises:
            BackendError: a tensor does not have the size that the engine expects.
            torch.cuda.OutOfMemoryError: there is too little GPU memory for the weights.
        """
        engine, kept = context.engine, []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if name in self.weights:
                kept.append(tensor := self.weights[name])
            else:
                tensor = tensors[name]
            shape = tuple(engine.get_tensor_shape(name))
            if -1 in shape:
                is_input = engine.get_tensor_mode(name) == self.api.trt.TensorIOMode.INPUT
                if is_input and not context.set_input_shape(name, tuple(tensor.shape)):
                    raise BackendError(f"TensorRT refused shape {tuple(tensor.shape)} of {name}: {self.api.errors()}")
            elif math.prod(shape) != tensor.numel() or not tensor.is_contiguous():
                raise BackendError(f"an engine wants {name} of shape {shape}; got a buffer of {tuple(tensor.shape)}.")
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise BackendError(f"TensorRT refused the address of {name}: {self.api.errors()}")
        return kept

    def enqueue(self, context: Any) -> None:
        """Enqueue an engine on torch's current stream, without waiting for it.

        Raises:
            BackendError: TensorRT refused.
        """
        if not context.execute_async_v3(torch.cuda.current_stream(self.weights.device).cuda_stream):
            raise BackendError(f"TensorRT failed to run an engine: {self.api.errors()}")

    @property
    def _limits(self) -> dict[str, int]:
        return {axis: getattr(self._provider.settings, setting) for axis, setting in _SETTINGS.items()}

    def key(self, graph: str, shapes: Shapes) -> Key:
        """The engine that serves a bucket: its own, or along dynamic axes the one that reaches up to the limit."""
        limits = self._limits
        sizes = {axis: bucket(axis, max(limits.get(axis, 1), getattr(shapes, axis))) for axis in shapes.dynamic}
        return graph, replace(shapes, **sizes).for_graph(graph)  # type: ignore[arg-type]

    def _verify(self, key: Key) -> None:
        """Compare an engine that was just built with the reference; a wrong one is deleted."""
        if not self._provider.pop_unchecked(*key):
            return
        self.built.add(key)
        if self._check is None:
            return
        (error, output), precision = self._check(*key), self._provider.precision
        limit = LIMITS[precision]
        logger.debug("the new engine %s %s is off by %.1e in %s", key[0], key[1].describe(), error, output)
        if error <= limit:
            return
        self.drop(key)
        self._provider.discard(*key)
        raise BackendError(
            f"TensorRT {self.api.version} built an engine that computes wrong values: {key[0]} {key[1].describe()} "
            f"{precision} is off by {error:.2g} in {output} against ONNX Runtime (relative; up to {limit:g} is rounding). It was "
            "deleted. Use precision='fp32' if the checkpoint overflows half precision, another batch size, another "
            "TensorRT, or backend='onnxruntime'. check_engines=False turns the check off."
        )
