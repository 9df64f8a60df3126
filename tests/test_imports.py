"""Every module imports alone, and none of them needs TensorRT, a GPU, or even ONNX Runtime to be imported."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys

import t5_trt
from tests.conftest import ROOT


def test_every_module_imports_bare() -> None:
    names = [module.name for module in pkgutil.walk_packages(t5_trt.__path__, "t5_trt.")]
    assert len(names) > 10
    code = (
        "import importlib, sys\n"
        "for missing in ('tensorrt', 'tensorrt_rtx', 'onnxruntime', 'polygraphy', 'cuda'): sys.modules[missing] = None\n"
        f"for name in {names!r}:\n"
        "    for loaded in [m for m in sys.modules if m.startswith('t5_trt')]: del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", code]
    kept = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # most modules are imported a hundred times
    run = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_command_line_and_build_processes_need_no_torch() -> None:
    """It takes seconds to import, for every build process and every --help."""
    code = (
        "import sys; sys.modules['torch'] = None; import t5_trt.cli, t5_trt.engine.build_worker, t5_trt.engine.bundle"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
