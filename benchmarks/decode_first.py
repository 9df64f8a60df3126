"""Time the first call of a process, from the imports to the first token, at a new size with a filled engine store.

    python -m benchmarks.decode_first --out FOLDER [--backends cuda,tensorrt-kernels] [--layers 2]

One process fills a new store with calls of other sizes and saves the checkpoint; the next one is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: (batch, source tokens) of the calls that fill the store, by backend: of few, some and many rows; TensorRT's encoder engines take sizes
#: up to powers of two, so one call builds what the timed one needs
FILLING = {"cuda": ((1, 20), (9, 20), (32, 20)), "tensorrt-kernels": ((7, 40),)}
TIMED = (5, 47)
LIMIT_S = 2.0


def fill(backend: str, folder: Path, layers: int) -> None:
    """Save a checkpoint and leave in the store what calls of other sizes need."""
    from benchmarks.kernel_models import t5_base

    t5_base(layers).save_pretrained(folder / "model")
    ours = load(backend, folder)
    for batch, tokens in FILLING[backend]:
        ours.generate(ids_of(batch, tokens), max_new_tokens=4, min_new_tokens=4)


def timed(backend: str, folder: Path) -> dict[str, Any]:
    """Load the checkpoint and generate; seconds from after the imports on."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    import t5_trt.kernels.decode_step  # noqa: F401 - part of the imports

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Notes when the prompt and each token come."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    start, clock = time.perf_counter(), Clock()
    torch.zeros(1, device="cuda")  # CUDA's own beginning
    torch.cuda.synchronize()
    begun = time.perf_counter()
    ours = load(backend, folder)
    loaded = time.perf_counter()
    ours.generate(ids_of(*TIMED), max_new_tokens=20, min_new_tokens=20, streamer=clock)
    first = clock.times[1]
    return {
        "cuda_begins_s": round(begun - start, 3),
        "load_s": round(loaded - begun, 3),
        "call_to_first_token_s": round(first - loaded, 3),
        "imports_to_first_token_s": round(first - start, 3),
    }


def load(backend: str, folder: Path) -> Any:
    """The checkpoint on a backend."""
    from benchmarks.kernel_models import BACKENDS
    from t5_trt import TRTT5ForConditionalGeneration

    options = {"precision": "fp16", "engine_cache_dir": folder / "store", **BACKENDS[backend]}
    return TRTT5ForConditionalGeneration.from_pretrained(folder / "model", **options)


def ids_of(batch: int, tokens: int) -> Any:
    """Sources, int64 [batch, tokens]."""
    from benchmarks import kernel_models
    from t5_trt.tools.random_models import random_source

    return random_source(batch, tokens).to(kernel_models.DEVICE)


def entries(folder: Path) -> int:
    """Engines and compiled kernels in the store."""
    from t5_trt.engine.store import EngineStore

    return len(list(EngineStore(folder / "store").entries()))


def child(stage: str, backend: str, folder: Path, layers: int) -> str:
    """Run a stage in a process of its own; what it printed last."""
    command = [sys.executable, "-m", "benchmarks.decode_first", "--stage", stage, "--backends", backend]
    made = subprocess.run(
        [*command, "--folder", str(folder), "--layers", str(layers)], cwd=ROOT, capture_output=True, text=True, env=os.environ.copy()
    )  # fmt: skip
    if made.returncode:
        raise RuntimeError(f"{stage} ended with {made.returncode}: {made.stderr[-800:]}")
    return made.stdout.strip().splitlines()[-1] if made.stdout.strip() else ""


def measure(backend: str, layers: int) -> dict[str, Any]:
    """Both processes of one backend."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        child("fill", backend, folder, layers)
        before = entries(folder)
        found = json.loads(child("timed", backend, folder, layers))
        return {**found, "stored_before": before, "made_by_the_timed_process": entries(folder) - before}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write; the status is 1 if the first token came too late or something was compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument("--backends", default="cuda", help=f"comma-separated, of {', '.join(FILLING)}")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--stage", choices=("fill", "timed"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.stage == "fill":
        return fill(given.backends, given.folder, given.layers)
    if given.stage == "timed":
        return print(json.dumps(timed(given.backends, given.folder)))
    if given.out is None:
        parser.error("--out is missing")
    from benchmarks.kernel_models import base_name, keep

    late = False
    for backend in given.backends.split(","):
        found = measure(backend, given.layers)
        sizes = {"batch": TIMED[0], "num_beams": 1, "source_tokens": TIMED[1]}
        model = {"model": base_name(given.layers), "precision": "fp16", "backend": backend}
        keep(given.out, "first-call", [{**model, **sizes, **found}], backend)
        print(backend, found, flush=True)
        late |= found["imports_to_first_token_s"] > LIMIT_S or found["made_by_the_timed_process"] > 0
    sys.exit(1 if late else 0)


if __name__ == "__main__":
    main()
