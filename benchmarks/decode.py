"""Time decoding on an NVIDIA GPU, by the library's kernels and by TensorRT's step, in one process.

Measured are the decoder step alone and with its token selection, generate() as a whole, the host's part of a call, and the capture of
a new size.

    python -m benchmarks.decode --out FOLDER [--backends cuda,tensorrt-kernels,tensorrt-engine] [--cases 1x1,8x4] [--layers 2]

T5-base shapes with random weights, fp16, 32 source tokens, 99 new tokens; Hugging Face eager in float16 in the same process. Times are
medians. Every case is written to FOLDER/decode.json as it comes. `benchmarks/decode_first.py` times the first call of a process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import kernel_models
from benchmarks.decode_parts import Captures, Launches
from benchmarks.gpu import NEW_TOKENS, SOURCE_TOKENS, events_ms, replay_us, selecting_slot, timed_ms
from benchmarks.kernel_models import attempt, base_name, keep, named_backends, open_model, sizes, t5_base
from t5_trt.tools.random_models import random_source
from t5_trt.tools.records import Record

#: (batch, beams)
CASES = ((1, 1), (1, 4), (8, 1), (32, 1), (8, 4), (32, 4))
LONG = 512  # new tokens at batch 1
#: new tokens of a request that no measured one shares its cache's size with
OTHER_SIZE = 2 * NEW_TOKENS


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write; the status is 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--backends", help="comma-separated; default: all that can run here")
    parser.add_argument("--cases", help="comma-separated batch x beams, such as 1x1,8x4; default: six of them")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--store", type=Path, default=Path("/var/tmp/t5_trt-kernel-engines"), help="of engines")
    parser.add_argument("--runs", type=int, default=9, help="calls that a median is of")
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face out")
    given = parser.parse_args(arguments)
    cases = CASES if given.cases is None else sizes(given.cases)
    hugging_face = t5_base(given.layers)
    peer = None if given.no_peer else t5_base(given.layers).half().to(kernel_models.DEVICE)
    models: dict[str, Any] = {}
    opened: dict[str, Record] = {}
    for backend in named_backends(given.backends):
        opened[backend] = {"model": base_name(given.layers), "precision": "fp16", "backend": backend}
        models[backend] = open_model(backend, hugging_face, "fp16", given.store)
        attempt(opened[backend], "open_s", lambda backend=backend: opening_seconds(models[backend]))
        attempt(opened[backend], "prepare_s", lambda backend=backend: prepare_seconds(models[backend], backend, cases))
    failed = [backend for backend, record in opened.items() if "failed" in record]
    copy_tb_s = copy_rate()
    for batch, beams in cases:
        arguments_ = request(batch, beams)
        records = {
            backend: measure(model, arguments_, given.runs, captures=backend != "tensorrt-engine")
            for backend, model in models.items()
            if "open_s" in opened[backend]
        }
        shared: Record = {"copy_tb_s": round(copy_tb_s, 2)}
        if peer is not None:
            attempt(shared, "hf_eager_fp16_ms", lambda now=arguments_: peer_ms(peer, now))
        for backend, found in records.items():
            keep(given.out, "decode", [{**opened[backend], **found, **shared}], backend)
            print(summary(backend, {**found, **shared}), flush=True)
            failed += [backend] if "failed" in found else []
    for backend, model in models.items():
        if backend != "tensorrt-engine" and backend not in failed:
            found = long_output(model)
            keep(given.out, "decode", [{**opened[backend], **found}], backend)
            print(
                backend, {name: value for name, value in found.items() if "us" in name or "ratio" in name}, flush=True
            )
    sys.exit(1 if failed else 0)


def request(batch: int, beams: int = 1, new: int = NEW_TOKENS, source: int = SOURCE_TOKENS) -> dict[str, Any]:
    """Random sources and a fixed number of new tokens."""
    ids = random_source(batch, source).to(kernel_models.DEVICE)
    fixed = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "num_beams": beams}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **fixed}


def opening_seconds(ours: Any) -> float:
    """How long a model's session takes to open: its weights on the GPU, in order."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    ours.session  # noqa: B018 - opens it
    torch.cuda.synchronize()
    return round(time.perf_counter() - start, 3)


def prepare_seconds(ours: Any, backend: str, cases: Sequence[tuple[int, ...]]) -> float:
    """Build engines side by side, and have kernels compiled by calls of other sizes than the cases'."""
    start = time.perf_counter()
    if backend.startswith("tensorrt"):
        from t5_trt.graph.signature import ENCODER, STEP

        engines = ours.session.engines
        shapes = [engines.bucket(B=batch, N=beams, S=SOURCE_TOKENS, T=NEW_TOKENS) for batch, beams in cases]
        graphs = (ENCODER, STEP) if backend == "tensorrt-engine" else (ENCODER,)
        engines.prefetch(list(dict.fromkeys((graph, each.for_graph(graph)) for graph in graphs for each in shapes)))
    if backend != "tensorrt-engine":
        for batch, beams in cases:  # one row fewer: what the encoder engines of the cases take too
            if batch > 2 or backend == "cuda":
                ours.generate(**request(batch - 1 if batch > 2 else 2, beams, 3))
    return round(time.perf_counter() - start, 2)


def measure(ours: Any, arguments: dict[str, Any], runs: int, *, captures: bool) -> Record:
    """All times of one request; with `captures`, that of a larger cache too, for which an engine would be built."""
    ids, mask, beams = arguments["input_ids"], arguments["attention_mask"], arguments["num_beams"]
    batch, short = len(ids), {**arguments, "min_new_tokens": NEW_TOKENS // 3, "max_new_tokens": NEW_TOKENS // 3}
    found: Record = {
        "batch": batch, "num_beams": beams, "source_tokens": SOURCE_TOKENS, "new_tokens": NEW_TOKENS, "step_us": {},
    }  # fmt: skip

    def first_call() -> float:
        with Captures() as seen:
            taken = wall_ms(lambda: ours.generate(**arguments))
        found["first_call_captures_ms"] = seen.times_ms
        return taken

    def whole_calls() -> float:
        median, p90 = timed_ms(lambda: ours.generate(**arguments), runs)
        found["ours_p90_ms"] = round(p90, 3)
        return round(median, 3)

    attempt(found, "first_call_ms", first_call)
    attempt(found, "ours_ms", whole_calls)
    found["loop"] = str(ours.last_generation_path)
    steps = found["step_us"]
    attempt(found, "short_call_ms", lambda: round(timed_ms(lambda: ours.generate(**short), runs)[0], 3))
    if "ours_ms" in found and "short_call_ms" in found:
        rest = (found["ours_ms"] - found["short_call_ms"]) / (NEW_TOKENS - NEW_TOKENS // 3)
        steps["by difference of calls"] = round(rest * 1e3, 1)
    attempt(steps, "with choice", lambda: with_choice_us(ours, arguments))
    attempt(steps, "alone", lambda: alone_us(ours, arguments))
    attempt(found, "encoder_ms", lambda: round(events_ms(lambda: ours.session.encode(ids, None, mask)), 3))
    attempt(found, "call_parts_ms", lambda: call_parts(ours, arguments, runs))
    if captures:
        attempt(found, "capture_ms", lambda: capture_ms(ours, arguments))
    if "failed" in steps:
        found.setdefault("failed", {}).update(steps.pop("failed"))
    return found


def wall_ms(work: Callable[[], Any]) -> float:
    """One call by the host's clock."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) * 1e3, 3)


def capture_ms(ours: Any, arguments: dict[str, Any]) -> float:
    """What CUDA graphs of a size cost that was never seen before: a larger cache, all else compiled and loaded already."""
    with Captures() as captures:
        ours.generate(**{**arguments, "min_new_tokens": OTHER_SIZE, "max_new_tokens": OTHER_SIZE})
    if not captures.times_ms:
        raise RuntimeError("nothing was captured")
    return round(max(captures.times_ms), 2)


def call_parts(ours: Any, arguments: dict[str, Any], runs: int) -> Record:
    """Medians: what passes on the host and on the GPU before the first step, during the steps, and after the last one."""
    found: dict[str, list[float]] = {}
    for _ in range(runs):
        with Launches(ours.session) as launches:
            launches.run(lambda: ours.generate(**arguments))
        for name, value in launches.parts().items():
            found.setdefault(name, []).append(value)
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


def with_choice_us(ours: Any, arguments: dict[str, Any]) -> float:
    """The GPU's time for a step with its token selection, positions from 0 to 98."""
    return round(replay_us(*selecting_slot(ours, arguments)), 1)


def alone_us(ours: Any, arguments: dict[str, Any]) -> float:
    """As `with_choice_us`, of the step up to its logits."""
    ids, beams = arguments["input_ids"], arguments["num_beams"]
    _, cross = ours.session.encode(ids, None, arguments["attention_mask"])
    state = ours.session.start(cross.for_beams(beams), NEW_TOKENS + 1)
    ours.session.decode(state, torch.zeros((len(ids) * beams, 1), dtype=torch.long, device=ids.device))
    return round(replay_us(state.binding.slot), 1)


def peer_ms(peer: Any, arguments: dict[str, Any], runs: int = 2) -> float:
    """Hugging Face's class, after a short call that does not count."""
    with torch.no_grad():
        peer.generate(**{**arguments, "min_new_tokens": 3, "max_new_tokens": 3})
        return round(statistics.median(wall_ms(lambda: peer.generate(**arguments)) for _ in range(runs)), 1)


def long_output(ours: Any, runs: int = 5) -> Record:
    """What the last steps of 512 cost beside the first, by the GPU's clock inside of whole calls."""
    arguments, first, last = request(1, new=LONG), [], []
    ours.generate(**arguments)
    for _ in range(runs):
        with Launches(ours.session) as launches:
            launches.run(lambda: ours.generate(**arguments))
        steps = launches.steps_us()
        first.append(statistics.median(steps[1:33]))
        last.append(statistics.median(steps[-32:]))
    found = {"first_steps_us": statistics.median(first), "last_steps_us": statistics.median(last)}
    ratio = found["last_steps_us"] / found["first_steps_us"]
    sizes = {"batch": 1, "num_beams": 1, "source_tokens": SOURCE_TOKENS, "new_tokens": LONG}
    return {**sizes, **{name: round(value, 1) for name, value in found.items()}, "ratio": round(ratio, 3)}


def copy_rate() -> float:
    """Of a large copy on the GPU, in TB/s read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=kernel_models.DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / events_ms(lambda: target.copy_(source)) / 1e9


def summary(backend: str, found: Record) -> str:
    """One line for a terminal."""
    steps, parts = found["step_us"], found.get("call_parts_ms", {})
    return (
        f"{backend:16} {found['batch']}x{found['num_beams']}: generate {found.get('ours_ms')} ms (Hugging Face fp16 "
        f"{found.get('hf_eager_fp16_ms')}), step with choice {steps.get('with choice')} us, alone {steps.get('alone')}, host before "
        f"the steps {parts.get('host before the steps')} ms, capture {found.get('capture_ms')} ms, first call {found.get('first_call_ms')} ms"
    )


if __name__ == "__main__":
    main()
