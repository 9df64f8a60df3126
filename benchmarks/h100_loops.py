"""Records of the decode loops on a GPU with TensorRT: T5-base shapes in fp16, greedy and beams, against Hugging Face.

Stage ``build`` fills the store, ``loops`` measures ours and both eager baselines in one process, ``long`` the cost of a
token in every cache bucket. ``compiled`` needs no TensorRT: Hugging Face with a static cache and torch.compile, on
whatever Python the machine has. Every stage appends to the same JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.shapes import random_source, random_t5

SOURCE_TOKENS, NEW_TOKENS = 32, 99
#: (batch, beams) -> tokens per second of the best beam that FasterTransformer's T5 guide gives for T5-base, fp16, an A100
CASES: dict[tuple[int, int], float | None] = {(1, 1): None, (32, 1): None, (1, 4): 671, (8, 4): 2807, (32, 4): 7102}


def request(rows: int, new: int = NEW_TOKENS, **options: Any) -> dict[str, Any]:
    """Random ids and a fixed number of new tokens."""
    ids = random_source(rows, SOURCE_TOKENS).cuda()
    fixed = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **fixed, **options}


def timed_ms(model: Any, arguments: dict[str, Any], runs: int) -> tuple[float, float]:
    """Median and 90th percentile of a whole ``generate()`` call after one warm-up, the GPU's work included."""
    model.generate(**arguments)
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(**arguments)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), sorted(times)[int(0.9 * (len(times) - 1) + 0.5)]


def our_model(store: Path, precision: str) -> Any:
    """T5-base shapes on TensorRT."""
    from t5_trt import TRTT5ForConditionalGeneration

    stock = random_t5("t5-base")
    return TRTT5ForConditionalGeneration.from_model(
        stock, backend="tensorrt", precision=precision, engine_cache_dir=store
    )


def replay_us(slot: Any, steps: int = NEW_TOKENS) -> dict[str, float]:
    """GPU time of one replay of each step that was recorded in a slot; "alone" is the engine and the K/V write only."""
    found = {}
    for key, step in slot.steps.items():
        slot.position.fill_(0)
        slot.position_host = -1
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(steps):
            step.graph.replay()
        end.record()
        torch.cuda.synchronize()
        found["alone" if key is None else "with choice"] = begin.elapsed_time(end) / steps * 1e3
    return found


def stage_build(store: Path, precision: str) -> list[dict[str, Any]]:
    """All engines of the other stages."""
    ours = our_model(store, precision)
    for (rows, beams), new in [*((case, 2) for case in CASES), ((1, 1), 512)]:
        start = time.perf_counter()
        ours.generate(**request(rows, new, num_beams=beams))
        print(f"batch {rows}, {beams} beams, {new} tokens: {time.perf_counter() - start:.1f} s", flush=True)
    return []


def stage_loops(store: Path, precision: str) -> list[dict[str, Any]]:
    """Every case, ours and eager Hugging Face, in one process."""
    from benchmarks.h100 import gpu_environment

    ours, records = our_model(store, precision), []
    baselines = {"fp32": random_t5("t5-base").cuda(), "fp16": random_t5("t5-base").half().cuda()}
    torch.backends.cuda.matmul.allow_tf32 = False
    for (rows, beams), published in CASES.items():
        arguments = request(rows, num_beams=beams)
        ours_ms, ours_p90_ms = timed_ms(ours, arguments, 9)
        eager = {name: timed_ms(model, arguments, 3)[0] for name, model in baselines.items()}
        got, expected = ours.generate(**arguments), baselines["fp32"].generate(**arguments)
        width = min(got.shape[1], expected.shape[1])
        gc.collect()  # requests that are over give their slots back
        ids, mask = arguments["input_ids"], arguments["attention_mask"]
        ours(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.zeros_like(ids[:, :1]))  # records "alone"
        gc.collect()
        shapes = ours.session.engines.bucket(B=rows, N=beams, S=SOURCE_TOKENS, T=1)
        step_us = replay_us(ours.session._idle[shapes][-1])
        encoder_ms = timed_encoder_ms(ours, ids, mask)
        gpu_ms = NEW_TOKENS * step_us["with choice"] / 1e3 + encoder_ms
        records.append(
            {
                "model": "t5-base shapes, random weights, seed 0",
                "precision": precision,
                "batch": rows,
                "source_tokens": SOURCE_TOKENS,
                "new_tokens": NEW_TOKENS,
                "num_beams": beams,
                "loop": str(ours.last_generation_path),
                "ours_ms": round(ours_ms, 2),
                "ours_p90_ms": round(ours_p90_ms, 2),
                "hf_eager_fp32_ms": round(eager["fp32"], 1),
                "hf_eager_fp16_ms": round(eager["fp16"], 1),
                "speedup_over_fp32": round(eager["fp32"] / ours_ms, 2),
                "tokens_per_s": round(rows * NEW_TOKENS / ours_ms * 1e3),
                "published_tokens_per_s": published,
                "step_us": {name: round(value, 1) for name, value in step_us.items()},
                "encoder_ms": round(encoder_ms, 3),
                "host_share": round(1 - gpu_ms / ours_ms, 3),
                "rows_equal": int((got[:, :width] == expected[:, :width]).all(1).sum()),
                "tokens_equal": got.shape == expected.shape and bool(torch.equal(got, expected)),
                **gpu_environment(),
            }
        )
        print(json.dumps(records[-1]), flush=True)
    return records


def timed_encoder_ms(ours: Any, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """GPU time of the encoder with cross K/V."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    ours.session.encode(ids, None, mask)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(20):
        ours.session.encode(ids, None, mask)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 20


def stage_long(store: Path, precision: str) -> list[dict[str, Any]]:
    """512 new tokens at batch 1: the step in every cache bucket that the request went through."""
    from benchmarks.h100 import gpu_environment

    ours = our_model(store, precision)
    arguments = request(1, 512)
    ours_ms, ours_p90_ms = timed_ms(ours, arguments, 5)
    gc.collect()
    buckets = {
        shapes.T: round(replay_us(slots[-1], 64)["with choice"], 1)
        for shapes, slots in sorted(ours.session._idle.items(), key=lambda item: item[0].T)
        if slots
    }
    record = {
        "model": "t5-base shapes, random weights, seed 0",
        "precision": precision,
        "batch": 1,
        "source_tokens": SOURCE_TOKENS,
        "new_tokens": 512,
        "num_beams": 1,
        "ours_ms": round(ours_ms, 2),
        "ours_p90_ms": round(ours_p90_ms, 2),
        "step_us_by_cache_tokens": buckets,
        "growth": round(max(buckets.values()) / min(buckets.values()) - 1, 3),
        **gpu_environment(),
    }
    print(json.dumps(record), flush=True)
    return [record]


def stage_compiled(store: Path, precision: str) -> list[dict[str, Any]]:
    """Hugging Face with a static cache and torch.compile, half precision."""
    from benchmarks.shapes import environment

    model, records = random_t5("t5-base").half().cuda(), []
    for rows, beams in CASES:
        arguments = request(rows, num_beams=beams, cache_implementation="static")
        start = time.perf_counter()
        try:
            model.generate(**arguments)
            first_s = time.perf_counter() - start
            compiled_ms, _ = timed_ms(model, arguments, 5)
        except Exception as error:  # it is their path that failed: that is the result
            print(f"batch {rows}, {beams} beams: {type(error).__name__}: {error}"[:300], flush=True)
            continue
        records.append(
            {
                "model": "t5-base shapes, random weights, seed 0",
                "precision": "fp16",
                "batch": rows,
                "source_tokens": SOURCE_TOKENS,
                "new_tokens": NEW_TOKENS,
                "num_beams": beams,
                "hf_compiled_fp16_ms": round(compiled_ms, 2),
                "first_call_s": round(first_s, 1),
                "gpu": torch.cuda.get_device_name(),
                **environment(),
            }
        )
        print(json.dumps(records[-1]), flush=True)
    return records


STAGES = {"build": stage_build, "loops": stage_loops, "long": stage_long, "compiled": stage_compiled}


def main() -> None:
    """Run one stage and append its records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--store", type=Path, default=Path("engines"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    records = STAGES[args.stage](args.store, args.precision)
    if args.json and records:
        known = json.loads(args.json.read_text()) if args.json.exists() else []
        args.json.write_text(json.dumps([*known, *records], indent=2) + "\n")


if __name__ == "__main__":
    main()
