"""What the benchmarks for a GPU share: requests, clocks, what a record says about the machine, and a command line of stages.

Nothing here needs an engine, so that Hugging Face's class can be timed where there is no TensorRT.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from t5_trt.engine.profiles import AXES
from t5_trt.tools.environment import environment
from t5_trt.tools.random_models import random_source, random_t5

SOURCE_TOKENS, NEW_TOKENS = 32, 99
BASE = "t5-base shapes, random weights, seed 0"
Records = Iterator[dict[str, Any]]
Stage = Callable[[Path, str], Records]


def request(rows: int = 1, new: int = NEW_TOKENS, **options: Any) -> dict[str, Any]:
    """Random ids [rows, SOURCE_TOKENS] on the GPU and a fixed number of new tokens, greedy unless options say otherwise."""
    ids = random_source(rows, SOURCE_TOKENS).cuda()
    fixed = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **fixed, **options}


def our_model(store: Path, precision: str, hugging_face: Any = None, **options: Any) -> Any:
    """A Hugging Face model, T5-base shapes unless one is given, on TensorRT, its decoder step too; options as of ``from_model``."""
    from t5_trt import TRTT5ForConditionalGeneration

    return TRTT5ForConditionalGeneration.from_model(
        random_t5("t5-base") if hugging_face is None else hugging_face,
        backend="tensorrt",
        precision=precision,
        engine_cache_dir=store,
        **{"decode": "engine", **options},
    )


def gpu_environment() -> dict[str, Any]:
    """Versions, TensorRT's included, GPU and driver."""
    from t5_trt.engine.tensorrt_api import load_tensorrt

    return environment(load_tensorrt().version)


def timed_ms(work: Callable[[], Any], runs: int = 5) -> tuple[float, float]:
    """Median and 90th percentile of wall times in milliseconds, the GPU's work included, after one warm-up."""
    work()
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), sorted(times)[int(0.9 * (runs - 1) + 0.5)]


def events_ms(work: Callable[[], Any], times: int = 20) -> float:
    """The GPU's time for one of several calls in a row, in milliseconds, after one warm-up."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    work()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def replay_us(slot: Any, key: Any = None, steps: int = NEW_TOKENS) -> float:
    """The GPU's time for one replay of a slot's captured step in microseconds, positions running up from 0."""
    start_over(slot, key)
    return events_ms(slot.steps[key].graph.replay, steps) * 1e3


def start_over(slot: Any, key: Any) -> None:
    """Bring a captured step back to position 0, and its search for tokens, which may be over, to its beginning."""
    for position in (slot.position, getattr(slot, "positions", None)):  # what the host and the kernels go by
        if position is not None:
            position.zero_()
    slot.position_host = -1
    selector = slot.steps[key].selector
    if selector is not None:
        prompt = torch.zeros((selector.rows, 1), dtype=torch.long, device=slot.position.device)
        beams = slot.shapes.N
        selector.begin(prompt) if beams == 1 else selector.begin(prompt, slot.shapes.T, slot.shapes.T)


def slot_alone(ours: Any, arguments: dict[str, Any]) -> Any:
    """The slot of a request, with a step captured in it that has no token selection."""
    gc.collect()  # requests that are over give their slots back
    ids, mask, beams = arguments["input_ids"], arguments["attention_mask"], arguments.get("num_beams", 1)
    _, cross = ours.session.encode(ids, None, mask)
    state = ours.session.start(cross.for_beams(beams), 1)
    ours.session.decode(state, torch.zeros((len(ids) * beams, 1), dtype=torch.long, device="cuda"))
    return state.binding.slot


def selecting_slot(ours: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Run a request; the slot that its last steps used, and the key there of the step captured with the token selection."""
    session, used = ours.session, []
    make_step = session.generation_step

    def noted(state: Any, make_selector: Any, key: Any) -> Any:
        step = make_step(state, make_selector, key)
        used.append((state.binding.slot, key))
        return step

    session.generation_step = noted
    try:
        ours.generate(**arguments)
    finally:
        del session.generation_step  # the class's own shows again
    gc.collect()  # a request that is over gives its slot back
    return used[-1]


def load_seconds(store: Path, precision: str, arguments: dict[str, Any], hugging_face: Any = None) -> float:
    """From a model without engines to its first tokens, with engines that the store has."""
    ours, start = our_model(store, precision, hugging_face), time.perf_counter()
    ours.generate(**arguments)
    return time.perf_counter() - start


def build_seconds(store: Path, ours: Any, slot: Any) -> dict[str, float]:
    """Graph -> seconds that its engine for a slot took, beside whatever was built at the same time."""
    from t5_trt.engine.store import EngineStore
    from t5_trt.graph.signature import ENCODER, STEP

    shapes = {graph: slot.shapes.for_graph(graph) for graph in (ENCODER, STEP)}
    sizes = {graph: {axis: getattr(each, axis) for axis in AXES} for graph, each in shapes.items()}
    model = {"precision": ours.session.precision, "architecture": asdict(ours.session.arch)}
    found = {}
    for entry in EngineStore(store).entries():
        made = entry.manifest
        same = all(made[name] == value for name, value in model.items())
        if same and sizes.get(made["graph"]) == {axis: made["shapes"][axis] for axis in AXES}:
            found[made["graph"]] = made["build_s"]
    return found


def call_times(ours: Any, hugging_face: Any, arguments: dict[str, Any], runs: int = 3) -> dict[str, float]:
    """Whole calls in milliseconds: ours, and the Hugging Face class in float32 and in half precision."""
    half = copy.deepcopy(hugging_face).half()
    models = {"ours_ms": ours, "hf_eager_fp32_ms": hugging_face, "hf_eager_fp16_ms": half}
    return {name: round(timed_ms(partial(model.generate, **arguments), runs)[0], 2) for name, model in models.items()}


def engine_times(store: Path, ours: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the engines of a request cost: seconds of their builds, microseconds of a step, milliseconds of the encoder."""
    slot, ids, mask = slot_alone(ours, arguments), arguments["input_ids"], arguments["attention_mask"]
    session = ours.session
    return {
        "build_s": build_seconds(store, ours, slot),
        "step_us": round(replay_us(slot), 1),
        "encoder_ms": round(events_ms(lambda: session.encode(ids, None, mask)), 3),
    }


def kernels(slot: Any, key: Any = None, most: int = 14) -> dict[str, Any]:
    """Kernels of a slot's captured step: how many, their summed time, and the most expensive names."""
    start_over(slot, key)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            slot.steps[key].graph.replay()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.device_time_total > 0]
    top = sorted(events, key=lambda e: -e.device_time_total)[:most]
    return {
        "step_kernels": sum(e.count for e in events) // 10,
        "step_kernel_sum_us": round(sum(e.device_time_total for e in events) / 10, 1),
        "top_kernels": [[e.key[:70], e.count / 10, round(e.device_time_total / 10, 1)] for e in top],
    }


def main(description: str | None, stages: dict[str, Stage], precision: str) -> None:
    """Run one stage and append each record to a file as it comes: what a time limit cuts off keeps what was measured."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--precision", default=precision)
    parser.add_argument("--store", type=Path, default=Path("engines"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for found in stages[args.stage](args.store, args.precision):
        record = {"stage": f"{Path(sys.argv[0]).stem} {args.stage}", **found}
        print(json.dumps(record), flush=True)
        if args.json:
            from t5_trt.tools.records import append_records

            append_records(args.json, [record])
