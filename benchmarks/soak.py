"""Send mixed requests to one model for minutes: results must stay right, and memory, threads and open files flat.

Requests differ in batch, source, length and decoding method; consumers of streamers go away, streamers and processors raise.
A sample of the results is compared with Hugging Face's class; where one differs, `benchmarks.soak_ties` looks whether
rounding explains it. The first requests, which are as large as any and on a GPU fill what is kept of recorded steps, and a tenth
of the time are warm-up; from then on nothing may grow. The exit status is 1 if anything is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import psutil
import torch
from transformers import AutoModelForSeq2SeqLM
from transformers.utils import logging as transformers_logging

from benchmarks.soak_requests import KINDS, SAMPLED, Request, Sizes, answer, draw_request, variants
from benchmarks.soak_ties import is_tie, rounding
from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.runtime.cuda_graph import free_unused
from t5_trt.tools.environment import environment

#: growth of memory that is not allowed, in 10**6 bytes for 1,000 requests
LIMIT_MB = 1.0
#: growth over a whole run that is not told from noise: free memory in malloc's heaps and in arenas comes and goes in pieces of it
NOISE_MB = 8.0
#: of results that are compared with the Hugging Face class
SHARE = 0.05
SAMPLE_EVERY = 20  # requests
#: kinds that between them need every step that is recorded
RECORDED = ("greedy", "scores", *SAMPLED, "beams")
#: largest difference of logits in float32 that still is rounding
ROUNDING = 1e-3
#: a parameter of glibc's ``mallopt``
M_ARENA_MAX = -8
#: for finding out, after the run, whether results that differ are ties
TIES_S = 60.0
#: at most, until what else the process opened at the end of a run is closed again
REST_S = 10.0


def _parts(rows: list[list[int]], expected: list[list[int]]) -> dict[str, Any]:
    """Which rows differ, and five tokens of the first from where it does."""
    which = [n for n, (got, want) in enumerate(zip(rows, expected, strict=True)) if got != want]
    got, want = rows[which[0]], expected[which[0]]
    place = next((n for n, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    return {"rows": which, "token": place, "got": got[place : place + 5], "wanted": want[place : place + 5]}


def use_one_heap() -> None:
    """Have all threads share malloc's first heap (glibc only): ``malloc_trim`` leaves free memory at the others' ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def _return_free_memory(on_gpu: bool) -> None:
    """Have malloc (glibc only) and torch give back what nobody uses: else tens of MB of it come and go."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if on_gpu:
        torch.cuda.synchronize()
        free_unused()


@dataclass
class Usage:
    """What this process holds between two requests; sizes in 10**6 bytes."""

    requests: int
    resident_mb: float
    threads: int
    open_files: int
    gpu_allocated_mb: float | None = None
    gpu_reserved_mb: float | None = None
    gpu_used_mb: float | None = None  # as nvidia-smi shows it for this process, TensorRT's own memory included

    @classmethod
    def now(cls, requests: int, on_gpu: bool) -> Usage:
        """Look."""
        gc.collect()
        _return_free_memory(on_gpu)
        process = psutil.Process()
        usage = cls(requests, process.memory_info().rss / 1e6, process.num_threads(), _open_files(process))
        if on_gpu:
            usage.gpu_allocated_mb = torch.cuda.memory_allocated() / 1e6
            usage.gpu_reserved_mb = torch.cuda.memory_reserved() / 1e6
            usage.gpu_used_mb = gpu_memory_mb(os.getpid())
        return usage


def gpu_memory_mb(process: int) -> float | None:
    """Memory of a process on all GPUs in 10**6 bytes, from nvidia-smi; None where that does not tell."""
    question = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [tuple(map(int, line.split(","))) for line in answer.splitlines()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    found = [mib for number, mib in rows if number == process]
    return sum(found) * 2**20 / 1e6 if found else None


@dataclass
class Soak:
    """What a run has seen."""

    answered: Counter[str] = field(default_factory=Counter)
    disturbed: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    different: list[dict[str, Any]] = field(default_factory=list)
    unexplained: list[tuple[Request, list[list[int]], dict[str, Any]]] = field(default_factory=list)
    rounding: float = 0.0  # largest difference of logits from the Hugging Face class's
    usage: list[Usage] = field(default_factory=list)
    warm: int = 0  # of `usage`, how many belong to the warm-up

    def slope(self, name: str) -> float | None:
        """Least squares growth of a kind of memory after the warm-up, in 10**6 bytes for 1,000 requests."""
        steady = [(usage.requests, getattr(usage, name)) for usage in self.usage[self.warm :]]
        if len(steady) < 2 or any(value is None for _, value in steady):
            return None
        return statistics.linear_regression(*zip(*steady, strict=True)).slope * 1000

    def broken(self) -> list[str]:
        """Bounds that do not hold, in words."""
        errors = [each for each in self.different if not each.get("tie")]
        found = [f"{len(errors)} of {self.compared} results differ by more than a tie"] if errors else []
        if self.rounding > ROUNDING:
            found.append(f"logits differ by {self.rounding:.2g}; at most {ROUNDING} is rounding")
        steady = self.usage[self.warm :]
        if len(steady) < 2:
            return [*found, f"{len(steady)} samples after the warm-up; at least 2 are needed. Run longer"]
        if not self.compared:
            found.append("no result was compared; run longer")
        span = (steady[-1].requests - steady[0].requests) / 1000
        for name in [name for name in vars(steady[0]) if name.endswith("_mb")]:
            slope = self.slope(name)
            if slope is not None and slope > LIMIT_MB and slope * span > NOISE_MB:
                found.append(f"{name} grows by {slope:.2f} in 1,000 requests; at most {LIMIT_MB} is allowed")
        return found + self.grown(steady[-1])

    def grown(self, last: Usage) -> list[str]:
        """What there is more of than in the warm-up: threads or open files."""
        found = []
        for name in ("threads", "open_files"):
            before, after = max(getattr(usage, name) for usage in self.usage[: self.warm + 1]), getattr(last, name)
            if after > before:
                found.append(f"{name} grew from {before} to {after}")
        return found


def _open_files(process: psutil.Process) -> int:
    """The least of several looks: a file that is just being closed, or that a library has open for a moment, is no leak."""
    looks = []
    for _ in range(5):
        looks.append(process.num_fds())
        time.sleep(0.02)
    return min(looks)


def look_last(seen: Soak, count: int, on_gpu: bool) -> None:
    """Add what is used once all requests are answered, unless the run was too short for a look before. A leak stays, so what else the
    process has open gets time to be closed.
    """
    if not seen.usage:
        return
    end, usage = time.monotonic() + REST_S, Usage.now(count, on_gpu)
    while seen.grown(usage) and time.monotonic() < end:
        time.sleep(0.2)
        usage = Usage.now(count, on_gpu)
    seen.usage.append(usage)


def soak(
    ours: Any,
    hugging_face: Any,
    sizes: Sizes,
    *,
    minutes: float,
    share: float = SHARE,
    seed: int = 0,
    verbose: bool = False,
) -> Soak:
    """Send requests for some minutes; the largest ones come before and are not counted in the time."""
    dice, seen, on_gpu = random.Random(seed), Soak(), ours.device.type == "cuda"
    vocabulary = ours.config.vocab_size

    def send(compare: bool, **fixed: Any) -> None:
        request = draw_request(dice, vocabulary, sizes, ours.device, **fixed)
        rows = answer(ours, request)
        (seen.disturbed if rows is None else seen.answered)[request.kind] += 1
        if rows is not None and compare:
            seen.compared += 1
            expected = answer(hugging_face, request)
            if rows != expected:
                shape = list(request.arguments["input_ids"].shape)
                where = _parts(rows, expected or [])
                seen.different.append({"kind": request.kind, "source": shape, "seed": request.seed, **where})
                seen.unexplained.append((request, rows, seen.different[-1]))
                print("different:", seen.different[-1], flush=True)

    for size in sizes.corners():
        seen.rounding = max(
            seen.rounding,
            rounding(
                ours,
                hugging_face,
                draw_request(dice, vocabulary, sizes, ours.device, kind="greedy", size=size, exact=True),
            ),
        )
        for kind in KINDS:
            send(True, kind=kind, size=size, exact=True)
        if on_gpu:  # record the steps that are kept
            for kind in RECORDED:
                for variant in variants(kind):
                    send(False, kind=kind, size=size, exact=True, variant=variant)
    start, count = time.monotonic(), sum((seen.answered + seen.disturbed).values())
    while (elapsed := time.monotonic() - start) < minutes * 60:
        send(dice.random() < share)
        count += 1
        if count % SAMPLE_EVERY == 0:
            seen.usage.append(Usage.now(count, on_gpu))
            if elapsed < minutes * 6:
                seen.warm = len(seen.usage)
            if verbose and count % (50 * SAMPLE_EVERY) == 0:
                print(f"{elapsed / 60:.1f} min", seen.usage[-1], f"different: {len(seen.different)}", flush=True)
    look_last(seen, count, on_gpu)
    end = time.monotonic() + TIES_S
    for request, rows, found in seen.unexplained:
        found["tie"] = is_tie(hugging_face, request, rows, seen.rounding, end)
        print("explained:", found, flush=True)
    return seen


def load(model: str, backend: str, precision: str, threads: int, store: Path | None) -> tuple[Any, Any]:
    """(model on engines, Hugging Face model on the same device)."""
    options: dict[str, Any] = {"backend": backend, "precision": precision, "num_threads": threads}
    options["engine_cache_dir"] = store
    if model == "tiny":
        from tests.tiny_models import make_hugging_face

        hugging_face = make_hugging_face("t5-v1.1")
        ours = TRTT5ForConditionalGeneration.from_model(hugging_face, **options)
    else:
        hugging_face = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32).eval()
        ours = TRTT5ForConditionalGeneration.from_pretrained(model, **options)
    for each in (hugging_face, ours):
        each.generation_config.max_length = None  # the checkpoint's would be named in a warning at every request
    return ours, copy.deepcopy(hugging_face).to(ours.device)


def make_record(seen: Soak, args: argparse.Namespace, ours: Any) -> dict[str, Any]:
    """What is kept of a run."""
    from t5_trt.engine.tensorrt_api import load_tensorrt

    steady, on_gpu = seen.usage[seen.warm :], ours.session.backend == "tensorrt"
    thin = max(len(seen.usage) // 60, 1)
    slopes = {name: seen.slope(name) for name in Usage.__annotations__ if name.endswith("_mb")}
    return {
        "model": Path(args.model).name,
        "backend": ours.session.backend,
        "precision": ours.session.precision,
        "threads": args.threads,
        "minutes": args.minutes,
        "seed": args.seed,
        "largest": {"batch": args.batch, "source_tokens": args.source_tokens, "new_tokens": args.new_tokens},
        "requests": sum((seen.answered + seen.disturbed).values()),
        "answered": dict(seen.answered),
        "disturbed": dict(seen.disturbed),
        "compared": seen.compared,
        "different": seen.different,
        "largest_difference_of_logits": seen.rounding,
        "growth_mb_per_1000_requests": {name: round(slope, 3) for name, slope in slopes.items() if slope is not None},
        "after_warm_up": vars(steady[0]) if steady else None,
        "at_the_end": vars(steady[-1]) if steady else None,
        "broken": seen.broken(),
        "usage": [list(vars(usage).values()) for usage in seen.usage[::thin]],
        "usage_columns": list(Usage.__annotations__),
        **environment(load_tensorrt(ours.runtime_config.flavor).version if on_gpu else None),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples" / "kana_romaji"), help='a folder, or "tiny"')
    parser.add_argument("--backend", choices=("auto", "onnxruntime", "tensorrt"), default="auto")
    parser.add_argument(
        "--precision", default="fp32", help="results are equal to the Hugging Face class's in fp32 only"
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    for size in ("batch", "source_tokens", "new_tokens"):
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, default=getattr(Sizes, size), help="largest")
    parser.add_argument("--store", type=Path, help="folder of built engines")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    args = parser.parse_args(arguments)
    use_one_heap()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    ours, hugging_face = load(args.model, args.backend, args.precision, args.threads, args.store)
    sizes = Sizes(args.batch, args.source_tokens, args.new_tokens, few=ours.device.type == "cuda")
    seen = soak(ours, hugging_face, sizes, minutes=args.minutes, seed=args.seed, verbose=True)
    record = make_record(seen, args, ours)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name != "usage"}, indent=1))
    return 1 if record["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
