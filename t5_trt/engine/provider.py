"""Lazy get-or-build: from "this graph at these shapes" to the bytes of a plan, from memory, disk or a build."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from t5_trt.architecture import Architecture
from t5_trt.config import BuildConfig
from t5_trt.engine.builder import EngineRequest, build_engine
from t5_trt.engine.cache_key import engine_key, weights_digest
from t5_trt.engine.store import EngineStore
from t5_trt.engine.tensorrt_api import load_tensorrt
from t5_trt.graph.ops import Weights


class EngineProvider:
    """Plans of one model for one TensorRT and one kind of GPU.

    Args:
        arch: of the model.
        weights: state-dict key -> CPU tensor.
        store: where plans are kept.
        settings: of the builder.
        precision: resolved precision.
        flavor: "tensorrt" or "rtx".
        gpu: facts about the GPU that plans are bound to (name, compute capability), or the list of capabilities.
        compute_capabilities: to build for without a GPU.
        show_progress: draw bars; None does so on a terminal only.
    """

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        store: EngineStore,
        settings: BuildConfig,
        *,
        precision: str,
        flavor: str,
        gpu: dict[str, Any],
        compute_capabilities: tuple[str, ...] = (),
        show_progress: bool | None = None,
    ) -> None:
        self.arch = arch
        self.store = store
        self.settings = settings
        self.precision = precision
        self.flavor = flavor
        self.gpu = gpu
        self.compute_capabilities = compute_capabilities
        self.show_progress = show_progress
        self._weights = weights
        self.version = load_tensorrt(flavor).version

    @cached_property
    def digest(self) -> str:
        """Of the weights; read once."""
        return weights_digest(self._weights, self.arch)

    def request(self, graph: str, shapes: Any) -> EngineRequest:
        """The request for a graph at given shapes."""
        return EngineRequest(
            graph=graph,
            shapes=shapes.for_graph(graph),
            precision=self.precision,
            flavor=self.flavor,
            compute_capabilities=self.compute_capabilities,
        )

    def facts(self, request: EngineRequest) -> dict[str, Any]:
        """Everything that the bytes of an engine depend on."""
        return {
            "graph": request.graph,
            "shapes": request.shapes.as_dict(),
            "precision": request.precision,
            "weights": self.digest,
            "workspace_bytes": self.settings.workspace_bytes,
            "optimization_level": self.settings.optimization_level,
            "flavor": request.flavor,
            "tensorrt": self.version,
            "gpu": self.gpu,
        }

    def plan(self, graph: str, shapes: Any) -> bytes:
        """The plan of a graph at given shapes, loaded or built.

        Raises:
            BackendError, InputError: see `t5_trt.engine.builder.build_engine` and the store.
        """
        request = self.request(graph, shapes)
        facts = self.facts(request)

        def build(folder: Path) -> None:
            timing = self.store.root / f"timing-{self.flavor}-{self.version}.cache"
            build_engine(
                request,
                self.arch,
                self._weights,
                folder,
                self.settings,
                timing_cache=None if self.compute_capabilities else timing,
                show_progress=self.show_progress,
            )

        return self.store.get_or_build(engine_key(facts), facts, build)

    def plans(self, wanted: Sequence[tuple[str, Any]]) -> list[bytes]:
        """Several plans; those that must be built are built side by side."""
        _ = self.digest  # once, not in every thread
        with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
            return list(pool.map(lambda item: self.plan(*item), wanted))

    def has(self, graph: str, shapes: Any) -> bool:
        """Whether the engine is on disk and whole."""
        return self.store.get(engine_key(self.facts(self.request(graph, shapes)))) is not None
