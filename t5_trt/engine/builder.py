"""Builds a plan from a graph: writes the ONNX file, runs a build process over it, and forwards its messages."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

import t5_trt.errors
from t5_trt.config import BuildConfig
from t5_trt.engine.profiles import Shapes, fixed_axes, input_shapes
from t5_trt.engine.progress import BuildProgress
from t5_trt.engine.tensorrt_api import BuildJob
from t5_trt.errors import BackendError
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.build_graph import build_device_graph
from t5_trt.graph.parameters import Weights
from t5_trt.graph.precision import real_type

logger = logging.getLogger("t5_trt.tensorrt")


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """A request to build one engine.

    Attributes:
        graph: one of `t5_trt.graph.signature.GRAPHS`.
        shapes: its sizes.
        precision: "fp32", "tf32", "fp16" or "bf16".
        flavor: "tensorrt" or "rtx".
        compute_capabilities: to build for without a GPU; empty builds for the GPU that is there.
        debug_outputs: also output the residual stream after every block.
    """

    graph: str
    shapes: Shapes
    precision: str
    flavor: str
    compute_capabilities: tuple[str, ...] = ()
    debug_outputs: bool = False

    @property
    def label(self) -> str:
        """A description such as "decoder_step B1 N4 S32 T128 fp16"."""
        return f"{self.graph} {self.shapes.describe()} {self.precision}"


def write_onnx(request: EngineRequest, arch: Architecture, path: Path, quantized: Weights | None = None) -> None:
    """Write the graph of a request; only 8-bit weights are stored, in a file beside it."""
    real = real_type(request.precision)
    fixed = fixed_axes(request.shapes)
    model = build_device_graph(
        request.graph, arch, real, fixed=fixed, quantized=quantized, debug_outputs=request.debug_outputs
    )
    ir.save(model, path, external_data=None if quantized is None else "weights")


def build_engine(
    request: EngineRequest,
    arch: Architecture,
    folder: Path,
    settings: BuildConfig,
    *,
    quantized: Weights | None = None,
    timing_cache: Path | None = None,
    show_progress: bool | None = None,
) -> None:
    """Build an engine into ``folder/engine.plan``.

    Raises:
        BackendError: TensorRT cannot parse or build the graph, or the build process died.
        InputError: this TensorRT does not support the request.
        KeyboardInterrupt: Ctrl-C; the build process is stopped first.
    """
    onnx_path = folder / "model.onnx"
    with BuildProgress(request.label, show_progress) as progress:
        write_onnx(request, arch, onnx_path, quantized)
        job = BuildJob(
            onnx_path=str(onnx_path),
            plan_path=str(folder / "engine.plan"),
            flavor=request.flavor,
            precision=request.precision,
            profile={name: tuple(shapes) for name, shapes in input_shapes(request.graph, arch, request.shapes).items()},  # type: ignore[misc]
            workspace_bytes=settings.workspace_bytes,
            optimization_level=settings.optimization_level,
            timing_cache=None if timing_cache is None else str(timing_cache),
            compute_capabilities=request.compute_capabilities,
        )
        run_job(job, request.label, progress)


def run_job(job: BuildJob, label: str, progress: BuildProgress) -> None:
    """Run a build process to its end; on any exception, Ctrl-C included, stop it and wait for it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    package_parent = str(Path(t5_trt.errors.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "t5_trt.engine.build_worker", job.to_json()]
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
        failure: dict[str, Any] | None = None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                failure = _handle(line, progress) or failure
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()
        if failure is not None:
            kind = getattr(t5_trt.errors, str(failure["type"]), BackendError)
            raise kind(f"building {label}: {failure['message']}")
        if process.returncode != 0 or not Path(job.plan_path).is_file():
            stderr.seek(0)
            raise BackendError(
                f"building {label}: the build process ended with status {process.returncode}. Its last words: "
                f"{stderr.read()[-800:].strip() or 'none'}. A negative status is a signal; -9 often means that memory ran out."
            )


def _handle(line: str, progress: BuildProgress) -> dict[str, Any] | None:
    """Handle one line of the build process; return an error report if it is one."""
    try:
        message = json.loads(line)
    except ValueError:  # a library printed something
        logger.debug("%s", line.rstrip())
        return None
    kind = message.get("kind") if isinstance(message, dict) else None
    if kind == "progress":
        progress.update(message["phase"], message["step"], message["steps"])
    elif kind == "log":
        logger.log(message["level"], "%s", message["message"])
    return message if kind == "error" else None
