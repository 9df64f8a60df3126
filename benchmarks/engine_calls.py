"""Time whole calls of generate() by TensorRT's engines on a GPU, greedy and with beams, against Hugging Face's class.

T5-base shapes with random weights in fp16.

build, build-curves  fill the store with the engines of the other stages
loops                ours and both eager baselines in one process (smoke: of T5-small, to see that it works)
kernels              print the kernels of a step
long                 the cost of a token in every cache bucket
curves               latency against batch and new tokens
compiled             Hugging Face's class with a static cache and torch.compile; needs no TensorRT

Every stage appends to the same JSON file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode import call_parts
from benchmarks.decode_parts import Captures
from benchmarks.gpu import (
    BASE,
    NEW_TOKENS,
    SOURCE_TOKENS,
    Records,
    events_ms,
    gpu_environment,
    kernels,
    main,
    our_model,
    replay_us,
    request,
    selecting_slot,
    slot_alone,
    timed_ms,
)
from t5_trt.tools.environment import environment
from t5_trt.tools.random_models import RANDOM, random_t5

#: (batch, beams) -> tokens per second of the best beam that FasterTransformer's T5 guide gives for T5-base, fp16, an A100
CASES: dict[tuple[int, int], float | None] = {(1, 1): None, (32, 1): None, (1, 4): 671, (8, 4): 2807, (32, 4): 7102}
LONG_TOKENS = 512
RUNS = 5  # that a median of a call's parts is of
#: latency against batch at 64 new tokens, and against new tokens at batch 1
BATCHES, LENGTHS = (1, 2, 4, 8, 16, 32), (16, 64, 128, 256)
#: (batch, beams, cache tokens) of the engines that stages need: one token fewer is cached than there are
LOOP_SIZES = [(rows, beams, NEW_TOKENS) for rows, beams in CASES] + [(1, 1, 256), (1, 1, LONG_TOKENS)]
CURVE_SIZES = [(rows, 1, 64) for rows in BATCHES] + [(1, 1, tokens) for tokens in LENGTHS]


def stage_build(store: Path, precision: str, sizes: Sequence[tuple[int, int, int]] = LOOP_SIZES) -> Records:
    """All engines of other stages, side by side."""
    from t5_trt.graph.signature import ENCODER, STEP

    ours, start = our_model(store, precision), time.perf_counter()
    engines = ours.session.engines
    shapes = [engines.bucket(B=rows, N=beams, S=SOURCE_TOKENS, T=tokens) for rows, beams, tokens in sizes]
    wanted = [(STEP, each) for each in shapes] + [(ENCODER, each) for each in shapes]
    engines.prefetch(list(dict.fromkeys((graph, each.for_graph(graph)) for graph, each in wanted)))
    print(f"engines: ready after {time.perf_counter() - start:.1f} s")
    return iter(())


def stage_loops(
    store: Path, precision: str, shape: str = "t5-base", cases: dict[tuple[int, int], float | None] = CASES
) -> Records:
    """Every case, ours and eager Hugging Face, in one process."""
    ours = our_model(store, precision, random_t5(shape))
    baselines = {"fp32": random_t5(shape).cuda(), "fp16": random_t5(shape).half().cuda()}
    torch.backends.cuda.matmul.allow_tf32 = False
    for (rows, beams), published in cases.items():
        arguments = request(rows, num_beams=beams)
        with Captures() as captures:
            ours.generate(**arguments)
        ours_ms, ours_p90_ms = timed_ms(lambda now=arguments: ours.generate(**now), 9)
        eager = {
            name: timed_ms(lambda model=model, now=arguments: model.generate(**now), 3)[0]
            for name, model in baselines.items()
        }
        loop = str(ours.last_generation_path)
        got, expected = ours.generate(**arguments), baselines["fp32"].generate(**arguments)
        step_us = {
            "with choice": replay_us(*selecting_slot(ours, arguments)),
            "alone": replay_us(slot_alone(ours, arguments)),
        }
        ids, mask = arguments["input_ids"], arguments["attention_mask"]
        encode = ours.session.encode
        encoder_ms = events_ms(lambda encode=encode, ids=ids, mask=mask: encode(ids, None, mask))
        gpu_ms = NEW_TOKENS * step_us["with choice"] / 1e3 + encoder_ms
        yield {
            "model": BASE.replace("t5-base", shape),
            "precision": precision,
            "batch": rows,
            "source_tokens": SOURCE_TOKENS,
            "new_tokens": NEW_TOKENS,
            "num_beams": beams,
            "loop": loop,
            "ours_ms": round(ours_ms, 2),
            "ours_p90_ms": round(ours_p90_ms, 2),
            "hf_eager_fp32_ms": round(eager["fp32"], 1),
            "hf_eager_fp16_ms": round(eager["fp16"], 1),
            "speedup_over_fp32": round(eager["fp32"] / ours_ms, 2),
            "tokens_per_s": round(rows * NEW_TOKENS / ours_ms * 1e3),
            "published_tokens_per_s": published,
            "step_us": {name: round(value, 1) for name, value in step_us.items()},
            "encoder_ms": round(encoder_ms, 3),
            "parts_ms": call_parts(ours, arguments, RUNS),
            "steps_without_reports_ms": unreported_steps_ms(ours, arguments),
            "capture_ms": max(captures.times_ms, default=None),
            "host_share": round(1 - gpu_ms / ours_ms, 3),
            "rows_equal": _rows_equal(got, expected),
            "hf_fp16_rows_equal": _rows_equal(baselines["fp16"].generate(**arguments), expected),
            "tokens_equal": got.shape == expected.shape and bool(torch.equal(got, expected)),
            **gpu_environment(),
        }


def _rows_equal(got: torch.Tensor, expected: torch.Tensor) -> int:
    width = min(got.shape[1], expected.shape[1])
    return int((got[:, :width] == expected[:, :width]).all(1).sum())


class NoReports:
    """In the place of a `Watcher`: the host looks at nothing until all steps are launched."""

    def __init__(self, report: torch.Tensor, ahead: int = 0) -> None:
        self._report, self._steps = torch.zeros_like(report, device="cpu"), 0

    def post(self, report: torch.Tensor) -> None:
        """Count."""
        self._steps += 1

    def take(self, *, all_of_them: bool = False) -> list[torch.Tensor]:
        """As if no row had ended, at the end."""
        return [self._report] * self._steps if all_of_them else []


def unreported_steps_ms(ours: Any, arguments: dict[str, Any]) -> float:
    """The GPU's milliseconds for all steps of a call whose reports are not copied to the host, to see what the copies cost."""
    from t5_trt.generation import decode_loop

    watcher = decode_loop.Watcher
    decode_loop.Watcher = NoReports  # type: ignore[assignment, misc]
    try:
        return call_parts(ours, arguments, RUNS)["GPU steps"]
    finally:
        decode_loop.Watcher = watcher  # type: ignore[misc]


def stage_kernels(store: Path, precision: str) -> Records:
    """The kernels of a step of every case, the token selection included; for reading, not for the records."""
    ours = our_model(store, precision)
    for rows, beams in CASES:
        arguments = request(rows, num_beams=beams)
        for name, (slot, which) in {
            "alone": (slot_alone(ours, arguments), None),
            "with choice": selecting_slot(ours, arguments),
        }.items():
            found = kernels(slot, which, 40)
            times = (
                f"{replay_us(slot, which):.0f} us, {found['step_kernels']} kernels of {found['step_kernel_sum_us']} us"
            )
            print(f"batch {rows}, {beams} beams, {name}: {times}")
            for kernel, count, us in found["top_kernels"]:
                print(f"  {us:8.1f} us {count:5.1f} x {kernel}", flush=True)
    return iter(())


def stage_long(store: Path, precision: str) -> Records:
    """512 new tokens at batch 1: the step in every cache bucket that the request went through."""
    ours, arguments = our_model(store, precision), request(1, LONG_TOKENS)
    ours_ms, ours_p90_ms = timed_ms(lambda: ours.generate(**arguments))
    step_us = {}
    for tokens in (128, 256, LONG_TOKENS):  # a request of so many tokens starts in that bucket
        step_us[tokens] = round(replay_us(*selecting_slot(ours, request(1, tokens - 1)), 64), 1)
    yield {
        "model": BASE,
        "precision": precision,
        "batch": 1,
        "source_tokens": SOURCE_TOKENS,
        "new_tokens": LONG_TOKENS,
        "num_beams": 1,
        "ours_ms": round(ours_ms, 2),
        "ours_p90_ms": round(ours_p90_ms, 2),
        "step_us_by_cache_tokens": step_us,
        "growth": round(max(step_us.values()) / step_us[128] - 1, 3),
        **gpu_environment(),
    }


def stage_curves(store: Path, precision: str) -> Records:
    """Latency against batch and against new tokens, as ``t5-trt bench`` measures it."""
    from t5_trt.tools.benchmark import Case, load_benchmark, measure

    benchmark = load_benchmark(
        RANDOM + "t5-base", backend="tensorrt", decode="engine", precision=precision, engine_cache_dir=store
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = dict.fromkeys([(rows, 64) for rows in BATCHES] + [(1, tokens) for tokens in LENGTHS])
    for rows, tokens in cases:
        yield measure(benchmark, Case(batch=rows, source_tokens=SOURCE_TOKENS, new_tokens=tokens), runs=3)


def stage_compiled(store: Path, precision: str) -> Records:
    """Hugging Face with a static cache and torch.compile, half precision."""
    model = random_t5("t5-base").half().cuda()
    for rows, beams in CASES:
        arguments = request(rows, num_beams=beams, cache_implementation="static")
        start = time.perf_counter()
        try:
            model.generate(**arguments)
            first_s = time.perf_counter() - start
            compiled_ms, _ = timed_ms(lambda now=arguments: model.generate(**now))
        except Exception as error:  # it is their path that failed: that is the result
            print(f"batch {rows}, {beams} beams: {type(error).__name__}: {error}"[:300], flush=True)
            continue
        yield {
            "model": BASE,
            "precision": "fp16",
            "batch": rows,
            "source_tokens": SOURCE_TOKENS,
            "new_tokens": NEW_TOKENS,
            "num_beams": beams,
            "hf_compiled_fp16_ms": round(compiled_ms, 2),
            "first_call_s": round(first_s, 1),
            "compiled": "_compiled_call" in vars(model),
            **environment(),
        }


STAGES = {
    "build": stage_build,
    "build-curves": partial(stage_build, sizes=CURVE_SIZES),
    "loops": stage_loops,
    "smoke": partial(stage_loops, shape="t5-small", cases={(1, 1): None, (1, 4): None}),
    "kernels": stage_kernels,
    "long": stage_long,
    "curves": stage_curves,
    "compiled": stage_compiled,
}

if __name__ == "__main__":
    main(__doc__, STAGES, "fp16")
