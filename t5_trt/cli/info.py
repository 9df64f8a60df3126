"""``t5-trt info``: what is installed, what "auto" chooses, and why."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from rich.table import Table

from t5_trt.cli.arguments import Json, console, print_json


def info(json: Json = False) -> None:
    """Say what is there, what "auto" chooses, and why."""
    facts = find_facts()
    if json:
        print_json(facts)
    else:
        _print_table(facts)


def find_facts() -> dict[str, Any]:
    """Versions, hardware and choices of this machine; for missing parts None, or the reason instead of a version."""
    import onnxruntime
    import torch
    import transformers

    import t5_trt
    from t5_trt.config import default_engine_cache_dir
    from t5_trt.kernels.cpu_compile import why_not_compiled
    from t5_trt.runtime.select import why_no_kernels, why_not_tensorrt

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda_of_torch": str(torch.version.cuda),
        }
    chosen, idle_gpu = _choice()
    return {
        "idle_gpu": idle_gpu,
        "t5_trt": t5_trt.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "c_compiler": _compiler(),
        "gpu": gpu,
        "tensorrt": _flavors(),
        "why_not_tensorrt": why_not_tensorrt(),
        "why_no_kernels": why_no_kernels(),
        "why_not_compiled": why_not_compiled(),
        "chosen": chosen,
        "encoders_by_kernels": _encoders_by_kernels(default_engine_cache_dir()),
        "engine_cache": str(default_engine_cache_dir()),
    }


def _compiler() -> str | None:
    """The C compiler for the decoder on a CPU: its command and version."""
    from t5_trt.errors import BackendError
    from t5_trt.kernels.cpu_compile import find_compiler

    try:
        return str(find_compiler())
    except BackendError:
        return None


def _encoders_by_kernels(cache: Path) -> list[dict[str, Any]]:
    """Stored encoder engines that were measured to be slower than our own kernels, so that "auto" does not use them."""
    from t5_trt.engine.store import TIMES, EngineStore

    found = []
    for entry in EngineStore(cache).entries():
        facts, times = entry.manifest, entry.manifest.get(TIMES)
        if isinstance(times, dict) and times.get("kernels", 0.0) < times.get("engine", 0.0):
            names = ("graph", "shapes", "precision", "gpu", "tensorrt")
            found.append({name: facts.get(name) for name in names} | {f"{name}_ms": ms for name, ms in times.items()})
    return found


def _choice() -> tuple[dict[str, str | None], str | None]:
    """Where a model would run and why, or why it would not; and the message about an unused GPU."""
    from t5_trt.config import RuntimeConfig, backend_from_environment
    from t5_trt.errors import T5TRTError
    from t5_trt.runtime.select import choose

    try:
        found = choose(RuntimeConfig(backend=backend_from_environment(None)))
    except T5TRTError as error:  # T5_TRT_BACKEND names a backend that cannot run here
        return {"backend": None, "precision": None, "decode": None, "device": None, "reason": str(error)}, None
    where = {
        "backend": found.backend,
        "precision": found.precision,
        "decode": found.decode,
        "device": str(found.device),
    }
    return {**where, "reason": found.reason}, found.idle_gpu


def _flavors() -> dict[str, dict[str, str | None]]:
    """Flavour of TensorRT -> its version, or why it is missing."""
    from t5_trt.engine.tensorrt_api import FLAVORS, load_tensorrt
    from t5_trt.errors import BackendError

    found: dict[str, dict[str, str | None]] = {}
    for flavor in FLAVORS:
        try:
            found[flavor] = {"version": load_tensorrt(flavor).version, "missing": None}
        except BackendError as error:
            found[flavor] = {"version": None, "missing": str(error)}
    return found


def _print_table(facts: dict[str, Any]) -> None:
    if facts["idle_gpu"]:  # before all else
        console().print(facts["idle_gpu"] + "\n", markup=False)
    table = Table(show_header=False)
    names = {"t5_trt": "t5_trt", "python": "Python", "torch": "PyTorch", "transformers": "Transformers"}
    for key, label in {**names, "onnxruntime": "ONNX Runtime"}.items():
        table.add_row(label, facts[key])
    table.add_row("C compiler", facts["c_compiler"] or "none")
    if gpu := facts["gpu"]:
        table.add_row("GPU", f"{gpu['name']}, compute capability {gpu['compute_capability']}")
        table.add_row("CUDA of PyTorch", gpu["cuda_of_torch"])
    else:
        table.add_row("GPU", "none that PyTorch can use")
    for flavor, found in facts["tensorrt"].items():
        table.add_row(f"TensorRT flavour {flavor!r}", found["version"] or found["missing"])
    table.add_row("can TensorRT run here?", facts["why_not_tensorrt"] or "yes")
    table.add_row("can our CUDA kernels?", facts["why_no_kernels"] or "yes")
    table.add_row("can our C code, on the CPU?", facts["why_not_compiled"] or "yes")
    chosen = facts["chosen"]
    words = f"{chosen['backend']} in {chosen['precision']} on {chosen['device']}: {chosen['reason']}"
    if chosen["backend"] is None:
        words = f"nothing: {chosen['reason']}"
    table.add_row("a model would run on", words)
    if chosen["decode"] is not None:
        kernels = "our C code" if chosen["backend"] == "onnxruntime" else "our CUDA kernels"
        table.add_row("decoder steps by", {"kernels": kernels, "engine": "the backend's engine"}[chosen["decode"]])
    for found in facts["encoders_by_kernels"]:
        size = " ".join(f"{axis}{count}" for axis, count in found["shapes"].items() if axis in "BS")
        words = f"{found['kernels_ms']:.2f} ms, by TensorRT {found['tensorrt']} {found['engine_ms']:.2f} ms"
        table.add_row(f"{found['graph']} {size} {found['precision']} by our kernels", words)
    table.add_row("engine cache", facts["engine_cache"])
    console().print(table)
