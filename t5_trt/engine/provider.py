"""Gets the plan of a graph at given shapes from disk, or builds it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from t5_trt.config import BuildConfig
from t5_trt.engine.builder import EngineRequest, build_engine
from t5_trt.engine.bundle import read_bundled, write_bundle
from t5_trt.engine.cache_key import engine_key
from t5_trt.engine.store import TIMES, EngineStore
from t5_trt.engine.tensorrt_api import load_tensorrt
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.parameters import Weights


class EngineProvider:
    """Plans of one architecture for one TensorRT and one kind of GPU; they hold no weights, so checkpoints share them.

    Args:
        arch: of the model.
        store: where plans are kept.
        settings: of the builder.
        precision: resolved precision.
        flavor: "tensorrt" or "rtx".
        gpu: facts about the GPU that plans are bound to (name, compute capability), or the list of capabilities.
        compute_capabilities: to build for without a GPU.
        bundle: folder of trusted engines stored with the checkpoint.
        show_progress: draw bars; None does so on a terminal only.
        quantized: makes the matrices that engines of 8-bit weights hold; None for other precisions.
        weights: digest of the weights in such engines.
    """

    def __init__(
        self,
        arch: Architecture,
        store: EngineStore,
        settings: BuildConfig,
        *,
        precision: str,
        flavor: str,
        gpu: dict[str, Any],
        compute_capabilities: tuple[str, ...] = (),
        bundle: Path | None = None,
        show_progress: bool | None = None,
        quantized: Callable[[], Weights] | None = None,
        weights: str | None = None,
    ) -> None:
        self.arch = arch
        self._quantized = quantized
        self._weights = weights
        self.store = store
        self.settings = settings
        self.precision = precision
        self.flavor = flavor
        self.gpu = gpu
        self.compute_capabilities = compute_capabilities
        self.bundle = bundle
        self.show_progress = show_progress
        self._handed_out: dict[str, Path] = {}
        self.version = load_tensorrt(flavor).version
        self._fresh: set[str] = set()  # keys of engines that this process built and that are not checked yet

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
        """The facts that the bytes of an engine depend on."""
        return {
            "graph": request.graph,
            "shapes": request.shapes.as_dict(),
            "precision": request.precision,
            "architecture": asdict(self.arch),
            "workspace_bytes": self.settings.workspace_bytes,
            "optimization_level": self.settings.optimization_level,
            "flavor": request.flavor,
            "tensorrt": self.version,
            "gpu": self.gpu,
            **({} if self._weights is None else {"weights": self._weights}),
        }

    def plan(self, graph: str, shapes: Any) -> bytes:
        """The plan of a graph at given shapes, loaded or built.

        Raises:
            BackendError, InputError: see `t5_trt.engine.builder.build_engine` and the store.
        """
        request = self.request(graph, shapes)
        facts = self.facts(request)
        key = engine_key(facts)
        if self.bundle is not None and (bundled := read_bundled(self.bundle, key)) is not None:
            self._handed_out[key] = self.bundle / key
            return bundled

        if (portable := self._portable_key(facts)) is not None and (plan := self.store.get(portable)) is not None:
            self._handed_out[portable] = self.store.root / portable
            return plan

        def build(folder: Path) -> None:
            # one for each kind of graph: TensorRT 8.5 does not read what processes on different graphs wrote
            timing = self.store.root / f"timing-{self.flavor}-{self.version}-{graph}-{self.precision}.cache"
            build_engine(
                request,
                self.arch,
                folder,
                self.settings,
                quantized=self._quantized() if self._quantized else None,
                timing_cache=None if self.compute_capabilities else timing,
                show_progress=self.show_progress,
            )
            self._fresh.add(key)

        plan = self.store.get_or_build(key, facts, build)
        self._handed_out[key] = self.store.root / key
        return plan

    def debug_plan(self, graph: str, shapes: Any) -> bytes:
        """Build a plan that also outputs the residual stream after every block; it is not stored."""
        request = replace(self.request(graph, shapes), debug_outputs=True)
        with tempfile.TemporaryDirectory(prefix="t5_trt-") as folder:
            quantized = self._quantized() if self._quantized else None
            build_engine(
                request, self.arch, Path(folder), self.settings, quantized=quantized, show_progress=self.show_progress
            )
            return (Path(folder) / "engine.plan").read_bytes()

    def write_bundle(self, checkpoint: Path) -> Path:
        """Copy all engines that were used beside a checkpoint, see `t5_trt.engine.bundle`."""
        return write_bundle(self._handed_out.values(), checkpoint)

    def pop_unchecked(self, graph: str, shapes: Any) -> bool:
        """Whether this process built the engine and it was not checked yet; a second call returns False."""
        key = engine_key(self.facts(self.request(graph, shapes)))
        if key not in self._fresh:
            return False
        self._fresh.discard(key)
        return True

    def discard(self, graph: str, shapes: Any) -> None:
        """Delete an engine that computes wrong values."""
        self.store.remove(engine_key(self.facts(self.request(graph, shapes))))

    def times(self, graph: str, shapes: Any) -> dict[str, float] | None:
        """The times that `keep_times` stored for an engine, by any process."""
        found = self.store.manifest(engine_key(self.facts(self.request(graph, shapes)))).get(TIMES)
        numbers = isinstance(found, dict) and all(isinstance(found.get(name), float) for name in ("engine", "kernels"))
        return found if numbers else None

    def keep_times(self, graph: str, shapes: Any, times: dict[str, float]) -> None:
        """Store an encoder's times in milliseconds, by "engine" and by our own "kernels", with its engine."""
        self.store.add_to_manifest(engine_key(self.facts(self.request(graph, shapes))), {TIMES: times})

    def plans(self, wanted: Sequence[tuple[str, Any]]) -> list[bytes]:
        """Several plans; missing ones are built in parallel."""
        with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
            return list(pool.map(lambda item: self.plan(*item), wanted))

    def has(self, graph: str, shapes: Any) -> bool:
        """Whether the engine is on disk and undamaged."""
        facts = self.facts(self.request(graph, shapes))
        return self._portable_key(facts) is not None or self.store.get(engine_key(facts)) is not None

    def _portable_key(self, facts: dict[str, Any]) -> str | None:
        """The key of an engine that was built without a GPU for several kinds of them, this one included."""
        capability = self.gpu.get("compute_capability")
        if self.flavor != "rtx" or capability is None:
            return None
        for entry in self.store.entries():
            made_for = entry.manifest.get("gpu")
            capabilities = made_for.get("compute_capabilities", ()) if isinstance(made_for, dict) else ()
            if capability in capabilities and entry.key == engine_key({**facts, "gpu": made_for}):
                return entry.key
        return None
