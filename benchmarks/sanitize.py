"""Run compute-sanitizer's memcheck and racecheck over the library's kernels on a small model.

    python -m benchmarks.sanitize --out FOLDER

steps   decoder steps launched one by one, of 3 and 18 rows, with beams and with caches and sources of several chunks
encoder the encoder's kernels, on sources of one to three tiles of keys, with holes and without any shown token
model   generate() of a model of one layer on backend="cuda", greedy and with beams, whose steps are CUDA graphs with the token selection

Each tool looks at each of them in a process of its own, all side by side. FOLDER gets sanitize.json and, from each log, the last lines.
The status is 1 unless all of them are clean.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STAGES, TOOLS = ("steps", "encoder", "model"), ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")
#: what a tool says at its end, with the number of what it found
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def steps() -> None:
    """Decoder steps without CUDA graphs."""
    from dataclasses import replace

    import torch

    from tests.gpu.step_cases import SMALL, make, run

    arch = replace(SMALL, d_model=72, num_heads=2, d_kv=40, d_ff=200, vocab_size=211, decoder_layers=1, gated=True)
    for dtype in (torch.float16, torch.float32):
        for positions, lengths, beams in (([3, 300, 255], [300], 3), ([7, 256] * 9, [1, 270, 33] * 3, 2)):
            case = make(arch, dtype, positions, lengths, beams)
            for _ in range(2):  # the second one finds what the first one left
                assert run(case).isfinite().all()


def encoder() -> None:
    """The encoder's kernels without CUDA graphs."""
    import random
    from dataclasses import replace

    import torch

    from tests.gpu.encoder_cases import (
        check,
        check_packed,
        check_residual_sum_and_norm,
        check_split_heads,
        random_mask,
    )
    from tests.gpu.step_cases import SMALL

    for width, length in ((64, 1), (64, 150), (40, 70), (128, 65)):
        arch = replace(SMALL, d_kv=width, num_heads=2)
        check(arch, torch.float16, random_mask(3, length, random.Random(length)), length)
    check_packed(replace(SMALL, num_heads=2), torch.float16, (70, 0, 128, 1, 63), random.Random(0))
    for size in (72, 1536):
        check_residual_sum_and_norm(size)
    check_split_heads()


def model() -> None:
    """Whole calls, with CUDA graphs."""
    import torch

    torch.cuda.init()  # now, before the imports below take their time: the tool waits for it

    from t5_trt import TRTT5ForConditionalGeneration
    from tests.tiny_models import batch, make_hugging_face

    hugging_face = make_hugging_face("t5-v1.1", num_layers=1, num_decoder_layers=1)
    with tempfile.TemporaryDirectory() as store:
        ours = TRTT5ForConditionalGeneration.from_model(
            hugging_face, backend="cuda", precision="fp16", engine_cache_dir=store
        )
        searches: tuple[dict[str, Any], ...] = (
            {},
            {"num_beams": 4},
            {"do_sample": True, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2},
            {"do_sample": True, "top_k": 0, "top_p": 0.999, "no_repeat_ngram_size": 2},
        )
        for rows, search in ((1, searches[0]), *((3, search) for search in searches)):
            inputs = {name: tensor.cuda() for name, tensor in batch(rows).items()}
            ours.generate(**inputs, **search, max_new_tokens=5, min_new_tokens=5)
    torch.cuda.synchronize()


def sanitizer() -> str:
    """Path of the program.

    Raises:
        SystemExit: it is not installed.
    """
    found = shutil.which("compute-sanitizer") or next(
        (f"{folder}/compute-sanitizer" for folder in PLACES if os.access(f"{folder}/compute-sanitizer", os.X_OK)), None
    )
    return found or sys.exit("compute-sanitizer is not here; it comes with CUDA's toolkit. Put it on the PATH.")


def check(tool: str, stage: str, program: str, limit_s: float) -> dict[str, Any]:
    """Run a stage under a tool: a record, with the log's end under "log"."""
    command = [program, "--tool", tool, "--print-limit", "5", "--target-processes", "application-only"]
    command += [
        "--launch-timeout",
        "120",
    ]  # how long the program may import before it uses the GPU; then the tool never sees it
    if tool == "memcheck":  # torch asks CUDA for functions that it does without if they are missing
        command += ["--report-api-errors", "no"]
    # every tensor of its own, so that reading beyond one is seen; captures need torch's allocator
    alone = {} if stage == "model" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            [*command, sys.executable, "-m", "benchmarks.sanitize", "--stage", stage],
            cwd=ROOT, env={**os.environ, **alone}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        file.seek(0)
        log = file.read()
    return {
        "tool": tool,
        "stage": stage,
        **verdict(log, status),
        "seconds": round(time.monotonic() - start, 1),
        "log": "\n".join(log.strip().splitlines()[-40:]),
    }


def verdict(log: str, status: int) -> dict[str, Any]:
    """Whether a log is of a run that ended well and found nothing, and the line that says so."""
    lines = [line.removeprefix("=========").strip() for line in log.splitlines()]
    found = [line for line in lines if SUMMARY.search(line)]
    numbers = [int(next(filter(None, SUMMARY.search(line).groups()))) for line in found]  # type: ignore[union-attr]
    clean = status == 0 and numbers == [0]
    return {"clean": clean, "status": status, "summary": found[-1] if found else (lines or ["no output"])[-1]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Check and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--limit-s", type=float, default=280, help="of a run")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.stage:
        return {"steps": steps, "encoder": encoder, "model": model}[given.stage]()
    if given.out is None:
        parser.error("--out is missing")
    program = sanitizer()
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip().splitlines()
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(check, tool, stage, program, given.limit_s) for tool in given.tools for stage in given.stages
        ]
        records = [run.result() for run in runs]
    from benchmarks.kernel_models import keep

    given.out.mkdir(parents=True, exist_ok=True)
    for record in records:
        text = record.pop("log")
        print(f"{record['tool']} {record['stage']}: {record['summary']} ({record['seconds']} s)", flush=True)
        if not record["clean"]:
            print(text, flush=True)
        (given.out / f"sanitize-{record['tool']}-{record['stage']}.log").write_text(text + "\n")
    named = {"backend": "cuda", "sanitizer": version[-1] if version else None}
    keep(given.out, "sanitize", [{**named, **record} for record in records])
    sys.exit(0 if all(record["clean"] for record in records) else 1)


if __name__ == "__main__":
    main()
