"""Records of the decode loops on a GPU with TensorRT: T5-base shapes in fp16, greedy and beams, against Hugging Face.

Stages ``build`` and ``build-curves`` fill the store, ``loops`` measures ours and both eager baselines in one process (``smoke``: of
T5-small, to see that it works), ``long`` the cost of a token in every cache bucket, ``curves`` latency against batch and new
tokens. ``compiled`` needs no TensorRT: Hugging Face with a static cache and torch.compile, on whatever Python the machine has.
Every stage appends to the same JSON file.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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
    slot_alone,
    timed_ms,
)
from t5_trt.tools.environment import environment
from t5_trt.tools.random_models import RANDOM, random_t5

#: (batch, beams) -> tokens per second of the best beam that FasterTransformer's T5 guide gives for T5-base, fp16, an A100
CASES: dict[tuple[int, int], float | None] = {(1, 1): None, (32, 1): None, (1, 4): 671, (8, 4): 2807, (32, 4): 7102}
LONG_TOKENS = 512
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
    print(f"engines: {len(engines._engines)} after {time.perf_counter() - start:.1f} s")
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
        ours_ms, ours_p90_ms = timed_ms(lambda now=arguments: ours.generate(**now), 9)
        eager = {
            name: timed_ms(lambda model=model, now=arguments: model.generate(**now), 3)[0]
            for name, model in baselines.items()
        }
        loop = str(ours.last_generation_path)
        got, expected = ours.generate(**arguments), baselines["fp32"].generate(**arguments)
        slot, key = captured(ours, rows, beams, arguments)
        step_us = {"with choice": replay_us(slot, key), "alone": replay_us(slot)}  # alone: the engine and the K/V write
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
            "parts_ms": parts_ms(ours, arguments),
            "steps_without_reports_ms": unreported_steps_ms(ours, arguments),
            **recording_cost(ours, slot, key),
            "host_share": round(1 - gpu_ms / ours_ms, 3),
            "rows_equal": _rows_equal(got, expected),
            "hf_fp16_rows_equal": _rows_equal(baselines["fp16"].generate(**arguments), expected),
            "tokens_equal": got.shape == expected.shape and bool(torch.equal(got, expected)),
            **gpu_environment(),
        }


def _rows_equal(got: torch.Tensor, expected: torch.Tensor) -> int:
    width = min(got.shape[1], expected.shape[1])
    return int((got[:, :width] == expected[:, :width]).all(1).sum())


def parts_ms(ours: Any, arguments: dict[str, Any], runs: int = 5) -> dict[str, float]:
    """Medians of a call's parts on the GPU's clock in milliseconds, its waiting for the host included."""
    from t5_trt.runtime.step_buffers import CapturedStep

    replay, found = CapturedStep.replay, []
    for _ in range(runs):
        events = {name: torch.cuda.Event(enable_timing=True) for name in ("start", "first step", "last step", "end")}
        steps = 0

        def timed(step: Any, slot: Any, state: Any, events: Any = events) -> None:
            nonlocal steps
            if steps == 0:
                events["first step"].record()
            replay(step, slot, state)
            steps += 1
            if steps == NEW_TOKENS:
                events["last step"].record()

        CapturedStep.replay = timed  # type: ignore[method-assign]
        try:
            torch.cuda.synchronize()
            events["start"].record()
            ours.generate(**arguments)
            events["end"].record()
            torch.cuda.synchronize()
        finally:
            CapturedStep.replay = replay  # type: ignore[method-assign]
        start, first, last, end = events.values()
        found.append((start.elapsed_time(first), first.elapsed_time(last), last.elapsed_time(end)))
    names = ("before the steps", "steps", "after the steps")
    return {
        name: round(statistics.median(times), 3) for name, times in zip(names, zip(*found, strict=True), strict=True)
    }


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
    """All steps of a call without the copies of their reports: what those cost."""
    from t5_trt.generation import decode_loop

    watcher = decode_loop.Watcher
    decode_loop.Watcher = NoReports  # type: ignore[assignment, misc]
    try:
        return parts_ms(ours, arguments)["steps"]
    finally:
        decode_loop.Watcher = watcher  # type: ignore[misc]


def captured(ours: Any, rows: int, beams: int, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The slot that the last request used, with a step without a token selector captured too, and the key of the one with."""
    gc.collect()  # requests that are over give their slots back
    session = ours.session
    shapes = session.engines.bucket(B=rows, N=beams, S=SOURCE_TOKENS, T=NEW_TOKENS + 1)
    slot = session._slots.idle[shapes][-1]
    chosen = next(key for key in reversed(slot.steps) if key is not None)
    session._slots.idle[shapes] = [slot]
    return slot_alone(ours, arguments), chosen


def recording_cost(ours: Any, slot: Any, key: Any, times: int = 8) -> dict[str, float]:
    """Milliseconds that a recording takes, and GPU memory in 10**6 bytes that each captured step holds."""
    selector, state, found = slot.steps[key].selector, SimpleNamespace(length=0), []
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # as a recording does
    free = torch.cuda.mem_get_info()[0]
    kept = []  # none is given back in between
    for number in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        kept.append(ours.session._steps.captured(slot, state, ("again", number), selector))
        found.append((time.perf_counter() - start) * 1e3)
    held = (free - torch.cuda.mem_get_info()[0]) / times
    return {"recording_ms": round(statistics.median(found), 2), "recorded_step_mb": round(held / 1e6, 2)}


def stage_kernels(store: Path, precision: str) -> Records:
    """The kernels of a step of every case, the token selection included; for reading, not for the records."""
    ours = our_model(store, precision)
    for rows, beams in CASES:
        arguments = request(rows, num_beams=beams)
        ours.generate(**arguments)
        slot, key = captured(ours, rows, beams, arguments)
        for name, which in (("alone", None), ("with choice", key)):
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
        ours.generate(**request(1, tokens - 1))
        gc.collect()
        slot = next(slots[-1] for shapes, slots in ours.session._slots.idle.items() if tokens == shapes.T and slots)
        step_us[tokens] = round(replay_us(slot, next(key for key in reversed(slot.steps) if key), 64), 1)
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
