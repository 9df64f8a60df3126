"""The only file that imports TensorRT: it picks the installed flavour and hides differences between versions.

It imports neither torch nor Transformers, so that a build process starts in a second. Flavours: "tensorrt" (8.5.3 to 11)
and "rtx" (TensorRT for RTX, `tensorrt_rtx`), which builds without a GPU and runs on compute capability 7.5, 8.x and 12.x.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t5_trt.errors import BackendError, InputError
from t5_trt.graph.signature import WIDE_MARK
from t5_trt.installation import install_command

logger = logging.getLogger("t5_trt.tensorrt")
FLAVORS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
TIMING_RUNS = 4
Report = Callable[[str, int, int], bool]


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """The settings of one build.

    Attributes:
        onnx_path: the graph.
        plan_path: where to write the engine.
        flavor: "tensorrt" or "rtx".
        precision: "fp32", "tf32", "fp16" or "bf16".
        profile: (smallest, optimal, largest) shape of each input with dynamic axes.
        workspace_bytes: largest scratch memory of the engine.
        optimization_level: 0 to 5, or None for TensorRT's default (TensorRT 8.6 and newer).
        timing_cache: file that is read if it exists, and rewritten; or None.
        compute_capabilities: such as "8.6", for which an RTX engine is built without a GPU.
    """

    onnx_path: str
    plan_path: str
    flavor: str
    precision: str
    profile: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
    workspace_bytes: int
    optimization_level: int | None = None
    timing_cache: str | None = None
    compute_capabilities: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """The job as text for the build process's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BuildJob:
        """Inverse of `to_json`."""
        return cls(**json.loads(text))


class TensorRT:
    """An imported TensorRT module behind a common interface.

    Attributes:
        trt: the module.
        flavor: "tensorrt" or "rtx".
        version: such as "8.5.3.1".
    """

    def __init__(self, flavor: str) -> None:
        # loading cuDNN and the CUDA modules of unused kernels would cost seconds and memory
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
        self.trt: Any = importlib.import_module(FLAVORS[flavor])
        self.flavor = flavor
        self.version = str(self.trt.__version__)
        self.major = int(self.version.split(".")[0])
        self.log = _make_log(self.trt)

    @property
    def strongly_typed(self) -> bool:
        """Whether tensors keep the graph's types (TensorRT 10 and newer, RTX) or are chosen by builder flags."""
        return hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    def check_precision(self, precision: str) -> None:
        """Check that this TensorRT has the type of a precision.

        Raises:
            InputError: bf16 with TensorRT 8.
        """
        if precision == "int8" and not self.strongly_typed:
            raise InputError(
                f"precision got 'int8'; TensorRT {self.version} cannot keep weights in 8 bits and compute in half precision (10.0 "
                "and newer can). Use 'fp16'."
            )
        if precision == "bf16" and not (hasattr(self.trt, "bfloat16") and self.strongly_typed):
            raise InputError(
                f"precision got 'bf16'; TensorRT {self.version} has no bfloat16 networks (10.0 and newer do). Use 'fp16'."
            )

    def load_engine(self, plan: bytes) -> Any:
        """Deserialize a plan. The caller must have verified it: loading a plan can run code.

        Raises:
            BackendError: TensorRT refuses it; its message is in the text.
        """
        self.log.errors.clear()
        runtime = self.trt.Runtime(self.log)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"TensorRT {self.version} could not load an engine: {self.errors()}")
        return engine

    def new_context(self, engine: Any) -> Any:
        """An execution context.

        Raises:
            BackendError: there is too little GPU memory.
        """
        self.log.errors.clear()
        context = engine.create_execution_context()
        if context is None:
            raise BackendError(
                f"TensorRT could not make an execution context ({self.errors()}). GPU memory is short: use a smaller batch "
                "or fewer beams, or free other models."
            )
        return context

    def errors(self) -> str:
        """TensorRT's last error messages."""
        return "; ".join(self.log.errors[-3:]) or "TensorRT gave no reason"

    def compile(self, job: BuildJob, report: Report) -> None:
        """Parse, optimize, and write the plan.

        Args:
            job: what to build.
            report: called with (phase, step, steps) if TensorRT reports progress; returning False cancels the build.

        Raises:
            BackendError: TensorRT cannot parse or build the graph; its messages are in the text.
            InputError: see `check_precision`.
        """
        trt = self.trt
        self.check_precision(job.precision)
        builder = trt.Builder(self.log)
        network = builder.create_network(self._network_flags())
        parser = trt.OnnxParser(network, self.log)
        if not parser.parse_from_file(job.onnx_path):
            problems = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise BackendError(f"TensorRT {self.version} cannot parse the graph: {problems}")
        linear = 1 << int(trt.TensorFormat.LINEAR)
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        for tensor in tensors:  # other formats cost reformat kernels at run time and multiply the build's work
            tensor.allowed_formats = linear
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
        self._set_precision(network, config, job.precision)
        self._set_tactics(config, job)
        if job.profile:
            profile = builder.create_optimization_profile()
            for name, (low, best, high) in job.profile.items():
                profile.set_shape(name, tuple(low), tuple(best), tuple(high))
            config.add_optimization_profile(profile)
        if job.compute_capabilities:
            config.num_compute_capabilities = len(job.compute_capabilities)
            for index, capability in enumerate(job.compute_capabilities):
                config.set_compute_capability(self._capability(capability), index)
        cache = self._load_timing_cache(config, job.timing_cache)
        if hasattr(trt, "IProgressMonitor"):
            config.progress_monitor = _make_monitor(trt, report)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BackendError(f"TensorRT {self.version} could not build the engine: {self.errors()}")
        Path(job.plan_path).write_bytes(plan)
        if cache is not None and job.timing_cache:
            _replace(Path(job.timing_cache), bytes(config.get_timing_cache().serialize()))

    def _network_flags(self) -> int:
        flags = self.trt.NetworkDefinitionCreationFlag
        if self.strongly_typed:
            return 1 << int(flags.STRONGLY_TYPED)
        return 1 << int(flags.EXPLICIT_BATCH)

    def _set_precision(self, network: Any, config: Any, precision: str) -> None:
        trt, flag = self.trt, self.trt.BuilderFlag
        if precision == "tf32":
            config.set_flag(flag.TF32)
        else:
            config.clear_flag(flag.TF32)
        if self.strongly_typed or precision != "fp16":
            return
        config.set_flag(flag.FP16)
        config.set_flag(flag.OBEY_PRECISION_CONSTRAINTS)
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if WIDE_MARK in layer.name and layer.type not in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE):
                layer.precision = trt.float32
                for output in range(layer.num_outputs):
                    layer.set_output_type(output, trt.float32)

    def _set_tactics(self, config: Any, job: BuildJob) -> None:
        source = self.trt.TacticSource
        if hasattr(source, "CUDNN") and self.major < 10:  # T5 has no use for it, and loading it costs a second
            config.set_tactic_sources(config.get_tactic_sources() & ~(1 << int(source.CUDNN)))
        if hasattr(
            config, "avg_timing_iterations"
        ):  # a single timing run is too noisy when several engines are built in parallel
            config.avg_timing_iterations = TIMING_RUNS
        if job.optimization_level is not None and hasattr(config, "builder_optimization_level"):
            config.builder_optimization_level = job.optimization_level

    def _capability(self, capability: str) -> Any:
        name = "SM" + capability.replace(".", "")
        try:
            return getattr(self.trt.ComputeCapability, name)
        except AttributeError:
            known = sorted((n for n in dir(self.trt.ComputeCapability) if n.startswith("SM")), key=lambda n: int(n[2:]))
            raise InputError(
                f"compute capability got {capability!r}; {self.flavor} {self.version} builds for "
                f"{', '.join(f'{n[2:-1]}.{n[-1]}' for n in known)}."
            ) from None

    def _load_timing_cache(self, config: Any, path: str | None) -> Any:
        if path is None or not hasattr(config, "create_timing_cache"):
            return None
        data = Path(path).read_bytes() if Path(path).exists() else b""
        self.log.quiet = True  # an unreadable cache is replaced: the user need not act
        try:
            cache = config.create_timing_cache(data)
            if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
                cache = config.create_timing_cache(b"")
                config.set_timing_cache(cache, ignore_mismatch=False)
        finally:
            self.log.quiet = False
            self.log.errors.clear()
        return cache


_LOADED: dict[str, TensorRT] = {}


def load_tensorrt(flavor: str | None = None) -> TensorRT:
    """Import a TensorRT flavour.

    Args:
        flavor: "tensorrt", "rtx", or None for ``T5_TRT_FLAVOR``, else the first that is installed.

    Raises:
        InputError: there is no such flavour.
        BackendError: it is not installed, or its libraries do not load; the message says how to install it.
    """
    flavor = flavor or os.environ.get("T5_TRT_FLAVOR") or None
    if flavor is not None and flavor not in FLAVORS:
        raise InputError(f"flavor got {flavor!r}; expected one of {', '.join(map(repr, FLAVORS))}.")
    reasons = []
    for name in (flavor,) if flavor else tuple(FLAVORS):
        if name not in _LOADED:
            try:
                _LOADED[name] = TensorRT(name)
            except (ImportError, OSError) as error:
                reasons.append(f"{FLAVORS[name]}: {error}")
                continue
        return _LOADED[name]
    hints = " or, on GeForce RTX, ".join(f"`{install_command(name)}`" for name in ((flavor,) if flavor else FLAVORS))
    raise BackendError(f"TensorRT is not usable here ({'; '.join(reasons)}). Install it with {hints}.")


def _make_log(trt: Any) -> Any:
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.INFO,  # TensorRT warns about its own choices; users cannot act on it
        trt.ILogger.Severity.INFO: logging.DEBUG,
    }

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Forwards TensorRT's messages to Python's logging, and keeps errors for exceptions."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.quiet = False

        def log(self, severity: Any, message: str) -> None:
            level = logging.DEBUG if self.quiet else levels.get(severity)
            if level == logging.ERROR:
                self.errors.append(message)
            if level is not None:
                logger.log(level, "%s", message)

    return Log()


def _make_monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Reports the steps of the outermost phase."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return report(phase_name, step + 1, self.steps.get(phase_name, 0))

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _replace(path: Path, data: bytes) -> None:
    """Write a file atomically: readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
