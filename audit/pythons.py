"""What can be tested on other Pythons in a minute: everything that needs no torch, whose wheels are gigabytes.

    python -m audit.pythons

For each supported Python that is found beside this one: an environment with the dependencies but torch and Transformers, all
files compile without a warning, the tests of TORCH_FREE, and TensorRT for RTX builds a graph that this Python wrote. Run it where
the project is installed. `make lint` checks types for the oldest and the newest supported Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.config import BuildConfig
from t5_trt.engine.builder import EngineRequest, write_onnx
from t5_trt.engine.profiles import Shapes, input_shapes
from t5_trt.engine.tensorrt_api import BuildJob

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "examples" / "kana_romaji"
SUPPORTED = ((3, 10), (3, 11), (3, 12), (3, 13))
#: what needs torch, or is large and for a GPU
LEFT_OUT = {"torch", "transformers", "cuda-bindings", "nvidia-cuda-nvrtc"}
TOOLS = ("pytest>=8", "pytest-timeout>=2.4", "psutil>=7")
#: tests that import neither torch nor Transformers, nor tests/conftest.py
TORCH_FREE = ("tests/engine/test_store.py", "tests/engine/test_faults.py")


def find_python(version: tuple[int, int]) -> Path | None:
    """An interpreter of that version that runs: on PATH, else one of pyenv's."""
    name = f"python{version[0]}.{version[1]}"
    candidates = [Path(found)] if (found := shutil.which(name)) else []
    root = os.environ.get("PYENV_ROOT")
    if root is None and shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True).stdout.strip()
    if root:
        candidates += sorted(Path(root).glob(f"versions/{version[0]}.{version[1]}.*/bin/python"), reverse=True)
    for candidate in candidates:
        try:  # pyenv puts shims on PATH that may end in "command not found"
            run = subprocess.run(
                [candidate, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True
            )
        except OSError:
            continue
        if run.returncode == 0 and run.stdout.split() == [str(part) for part in version]:
            return candidate
    return None


def make_environment(python: Path, folder: Path) -> Path:
    """Install what TORCH_FREE needs, unless it is there and newer than pyproject.toml; returns the environment's Python."""
    inside, done = folder / "bin" / "python", folder / "installed"
    if done.exists() and done.stat().st_mtime > (ROOT / "pyproject.toml").stat().st_mtime:
        return inside
    needed = [Requirement(text) for text in requires("t5-trt") or ()]
    wanted = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": "rtx-cu13"})]
    names = [f"{need.name}{need.specifier}" for need in wanted if need.name not in LEFT_OUT]
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    subprocess.run([inside, "-m", "pip", "install", "--quiet", "--no-compile", *names, *TOOLS], check=True)
    done.touch()
    return inside


def write_job(folder: Path) -> BuildJob:
    """The shipped model's encoder, written with torch here, to be built without it elsewhere."""
    arch = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, backend="onnxruntime").architecture
    shapes = Shapes().for_graph("encoder")
    request = EngineRequest(
        graph="encoder", shapes=shapes, precision="fp16", flavor="rtx", compute_capabilities=("8.9",)
    )
    write_onnx(request, arch, folder / "model.onnx")
    profile = {name: tuple(sizes) for name, sizes in input_shapes("encoder", arch, shapes).items()}
    return BuildJob(
        onnx_path=str(folder / "model.onnx"),
        plan_path=str(folder / "engine.plan"),
        flavor="rtx",
        precision="fp16",
        profile=profile,  # type: ignore[arg-type]
        workspace_bytes=BuildConfig().workspace_bytes,
        compute_capabilities=("8.9",),
    )


def check(python: Path) -> None:
    """All that can be tested without torch.

    Raises:
        subprocess.CalledProcessError: something failed; it has printed what.
        AssertionError: no engine was built.
    """
    clean = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    folders = ("t5_trt", "tests", "examples", "benchmarks", "audit")
    with tempfile.TemporaryDirectory() as compiled:
        apart = {**clean, "PYTHONPYCACHEPREFIX": compiled}
        subprocess.run([python, "-W", "error", "-m", "compileall", "-q", *folders], cwd=ROOT, env=apart, check=True)
    no_torch = (
        "import sys; sys.modules['torch'] = None; import t5_trt.cli, t5_trt.engine.build_worker, t5_trt.engine.bundle"
    )
    subprocess.run([python, "-W", "error", "-c", no_torch], cwd=ROOT, env=clean, check=True)
    subprocess.run([python, "-m", "pytest", "-q", "--noconftest", *TORCH_FREE], cwd=ROOT, env=clean, check=True)
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(Path(folder))
        worker = [python, "-W", "error", "-m", "t5_trt.engine.build_worker", job.to_json()]
        subprocess.run(worker, cwd=folder, env=clean, check=True, stdout=subprocess.DEVNULL)
        size = Path(job.plan_path).stat().st_size
        assert size > 10_000, f"the engine has {size} bytes; expected more than 10 000"


def main() -> int:
    """Check every Python that is found, and return the exit status: 1 if one of them fails."""
    failed = []
    for version in SUPPORTED:
        label, started = ".".join(map(str, version)), time.monotonic()
        try:
            if version == sys.version_info[:2]:
                print(f"Python {label}: this one; `make test` runs everything", flush=True)
                continue
            if (python := find_python(version)) is None:
                print(f"Python {label}: NOT TESTED, there is none here", flush=True)
                continue
            check(make_environment(python, ROOT / f".venv-python{label}"))
        except (subprocess.CalledProcessError, AssertionError) as error:
            print(f"Python {label}: {error}", file=sys.stderr, flush=True)
            failed.append(label)
            continue
        print(
            f"Python {label}: compiles, {len(TORCH_FREE)} test files, an engine ({time.monotonic() - started:.0f} s)",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
