"""Minutes of mixed requests on one model: are results right to the end, and do memory, threads and open files stay flat?

Requests differ in batch, source, length and decoding method; consumers of streamers go away, streamers and processors raise.
A sample of the results is compared with Hugging Face's stock class. The first requests, which are as large as any, and a
tenth of the time are warm-up; from then on nothing may grow. The exit status is 1 if anything is broken.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import queue
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import psutil
import torch
from transformers import AutoModelForSeq2SeqLM, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.environment import environment

#: growth of memory that is not allowed, in 10**6 bytes for 1,000 requests
LIMIT_MB = 1.0
#: growth over a whole run that is not told from noise: free memory in malloc's heaps and in arenas comes and goes in pieces of it
NOISE_MB = 8.0
#: of results that are compared with the stock class
SHARE = 0.05
SAMPLE_EVERY = 20  # requests
BEAMS = 4
#: seconds after which a token of a stream counts as lost
PATIENCE_S = 300
#: kind of request -> its weight among all
KINDS = {
    "greedy": 30,
    "sampling": 15,
    "beams": 15,
    "beam sampling": 5,
    "scores": 5,
    "stream": 10,
    "stream closed early": 10,
    "streamer raises": 5,
    "processor raises": 5,
}
STREAMED = {"stream", "stream closed early", "streamer raises"}


class PlannedError(Exception):
    """What streamers and processors of this script raise."""


@dataclass(frozen=True)
class Sizes:
    """Largest sizes of requests; on TensorRT few sizes are drawn, because each shape has engines of its own."""

    batch: int = 16
    source_tokens: int = 512
    new_tokens: int = 256
    few: bool = False

    def draw(self, dice: random.Random) -> tuple[int, int, int]:
        """Batch, source tokens and new tokens; small ones are as likely as large ones by order of magnitude."""
        if self.few:
            batch, source = dice.choice((1, self.batch)), dice.choice((min(32, self.source_tokens), self.source_tokens))
            return batch, dice.randint(source // 2 + 1, source), self._spread(dice, self.new_tokens)
        return tuple(self._spread(dice, size) for size in (self.batch, self.source_tokens, self.new_tokens))  # type: ignore[return-value]

    def corners(self) -> list[tuple[int, int, int]]:
        """The sizes that need the most memory; with few sizes all that need engines of their own."""
        largest = (self.batch, self.source_tokens, self.new_tokens)
        if not self.few:
            return [largest]
        sources = {min(32, self.source_tokens), self.source_tokens}
        return [(batch, source, self.new_tokens) for batch in sorted({1, self.batch}) for source in sorted(sources)]

    @staticmethod
    def _spread(dice: random.Random, largest: int) -> int:
        return min(largest, int((largest + 1) ** dice.random()))


@dataclass(frozen=True)
class Request:
    """One call of ``generate()``: its kind, arguments, the seed of its draws, and after how many tokens it is disturbed."""

    kind: str
    arguments: dict[str, Any]
    seed: int
    disturbed_at: int


class TokenStream(BaseStreamer):
    """Tokens for a consumer in another thread, as ``TextIteratorStreamer``; `put` raises once that consumer is gone."""

    def __init__(self) -> None:
        self._tokens: queue.Queue[list[int] | None] = queue.Queue()
        self._closed = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        """Take tokens."""
        if self._closed.is_set():
            raise PlannedError
        self._tokens.put(value.flatten().tolist())

    def end(self) -> None:
        """No more will come."""
        self._tokens.put(None)

    def close(self) -> None:
        """The consumer leaves."""
        self._closed.set()

    def __iter__(self) -> Iterator[list[int]]:
        while (piece := self._tokens.get(timeout=PATIENCE_S)) is not None:
            yield piece


class Raising(BaseStreamer):
    """A streamer, and a processor of logits, that raises after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: torch.Tensor) -> None:
        """Take tokens."""
        self.left -= 1
        if self.left < 0:
            raise PlannedError

    def end(self) -> None:
        """Nothing was thrown."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave scores as they are."""
        self.put(ids)
        return scores


def draw_request(dice: random.Random, vocabulary: int, sizes: Sizes, device: Any, **fixed: Any) -> Request:
    """A random request; `fixed` may name its ``kind`` and its ``size``, which then is also its exact length."""
    kind = fixed.get("kind") or dice.choices(list(KINDS), list(KINDS.values()))[0]
    batch, source, new = fixed.get("size") or sizes.draw(dice)
    if kind in STREAMED:
        batch = 1
    seed = dice.randrange(2**31)
    ids = torch.randint(3, vocabulary, (batch, source), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, batch):  # the first row fills the width
        mask[row, dice.randint(1, source) :] = 0
    arguments: dict[str, Any] = {
        "input_ids": ids.masked_fill(mask == 0, 0).to(device),
        "attention_mask": mask.to(device),
        "max_new_tokens": new,
        "do_sample": kind in ("sampling", "beam sampling"),
    }
    if "size" in fixed:
        arguments["min_new_tokens"] = new
    if arguments["do_sample"]:
        arguments |= {"temperature": round(dice.uniform(0.5, 1.5), 2), "top_k": dice.choice((0, 50))}
    if kind in ("beams", "beam sampling"):
        arguments |= {"num_beams": BEAMS, "early_stopping": dice.choice((True, False))}
    if kind == "scores":
        arguments |= {"return_dict_in_generate": True, "output_scores": True}
    return Request(kind, arguments, seed, dice.randint(0, new))


def answer(model: Any, request: Request) -> list[list[int]] | None:
    """Token rows of a request, or None where it was disturbed on purpose before it ended."""
    torch.manual_seed(request.seed)
    if request.kind in ("stream", "stream closed early"):
        return _stream(model, request)
    arguments = dict(request.arguments)
    disturbance = Raising(request.disturbed_at)
    if request.kind == "streamer raises":
        arguments["streamer"] = disturbance
    elif request.kind == "processor raises":
        arguments["logits_processor"] = LogitsProcessorList([disturbance])
    try:
        made = model.generate(**arguments)
    except PlannedError:
        return None
    rows: list[list[int]] = (made if isinstance(made, torch.Tensor) else made.sequences).tolist()
    return rows


def _stream(model: Any, request: Request) -> list[list[int]] | None:
    """Generate in a thread and read from it, to the end or not."""
    stream, failed = TokenStream(), []

    def work() -> None:
        try:
            model.generate(**request.arguments, streamer=stream)
        except BaseException as error:
            failed.append(error)
            stream.end()

    thread = threading.Thread(target=work)
    thread.start()
    row: list[int] = []
    for place, piece in enumerate(stream):
        row += piece
        if request.kind == "stream closed early" and place == request.disturbed_at:
            stream.close()
            break
    thread.join(PATIENCE_S)
    if thread.is_alive():
        raise TimeoutError(f"a stream did not end within {PATIENCE_S} s after its consumer left")
    if failed and not isinstance(failed[0], PlannedError):
        raise failed[0]
    return None if failed or request.kind == "stream closed early" else [row]


@dataclass
class Usage:
    """What this process holds between two requests; sizes in 10**6 bytes."""

    requests: int
    resident_mb: float
    threads: int
    open_files: int
    gpu_allocated_mb: float | None = None
    gpu_reserved_mb: float | None = None
    gpu_used_mb: float | None = None  # of the whole device, as nvidia-smi shows it

    @classmethod
    def now(cls, requests: int, on_gpu: bool) -> Usage:
        """Look."""
        gc.collect()
        process = psutil.Process()
        usage = cls(requests, process.memory_info().rss / 1e6, process.num_threads(), process.num_fds())
        if on_gpu:
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            usage.gpu_allocated_mb = torch.cuda.memory_allocated() / 1e6
            usage.gpu_reserved_mb = torch.cuda.memory_reserved() / 1e6
            usage.gpu_used_mb = (total - free) / 1e6
        return usage


@dataclass
class Soak:
    """What a run has seen."""

    answered: Counter[str] = field(default_factory=Counter)
    disturbed: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    different: list[dict[str, Any]] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)
    warm: int = 0  # of `usage`, how many belong to the warm-up

    def slope(self, name: str) -> float | None:
        """Least squares growth of a kind of memory after the warm-up, in 10**6 bytes for 1,000 requests."""
        steady = [(usage.requests, getattr(usage, name)) for usage in self.usage[self.warm :]]
        if len(steady) < 2 or steady[0][1] is None:
            return None
        return statistics.linear_regression(*zip(*steady, strict=True)).slope * 1000

    def broken(self) -> list[str]:
        """Bounds that do not hold, in words."""
        found = [f"{len(self.different)} of {self.compared} results differ"] if self.different else []
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
        for name in ("threads", "open_files"):
            before = max(getattr(usage, name) for usage in self.usage[: self.warm + 1])
            after = getattr(steady[-1], name)
            if after > before:
                found.append(f"{name} grew from {before} to {after}")
        return found


def soak(
    ours: Any, stock: Any, sizes: Sizes, *, minutes: float, share: float = SHARE, seed: int = 0, verbose: bool = False
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
            expected = answer(stock, request)
            if rows != expected:
                shape = list(request.arguments["input_ids"].shape)
                seen.different.append({"kind": request.kind, "source": shape, "seed": request.seed})

    for size in sizes.corners():
        for kind in KINDS:
            send(True, kind=kind, size=size)
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
    return seen


def load(model: str, backend: str, precision: str, threads: int, store: Path | None) -> tuple[Any, Any]:
    """(model on engines, stock model on the same device)."""
    options: dict[str, Any] = {"backend": backend, "precision": precision, "num_threads": threads}
    options["engine_cache_dir"] = store
    if model == "tiny":
        from tests.tiny_models import make_stock

        stock = make_stock("t5-v1.1")
        ours = TRTT5ForConditionalGeneration.from_model(stock, **options)
    else:
        stock = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32).eval()
        ours = TRTT5ForConditionalGeneration.from_pretrained(model, **options)
    for each in (stock, ours):
        each.generation_config.max_length = None  # the checkpoint's would be named in a warning at every request
    return ours, copy.deepcopy(stock).to(ours.device)


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
    parser.add_argument("--precision", default="fp32", help="results are equal to the stock class's in fp32 only")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    for size in ("batch", "source_tokens", "new_tokens"):
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, default=getattr(Sizes, size), help="largest")
    parser.add_argument("--store", type=Path, help="folder of built engines")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    args = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    ours, stock = load(args.model, args.backend, args.precision, args.threads, args.store)
    sizes = Sizes(args.batch, args.source_tokens, args.new_tokens, few=ours.device.type == "cuda")
    seen = soak(ours, stock, sizes, minutes=args.minutes, seed=args.seed, verbose=True)
    record = make_record(seen, args, ours)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name != "usage"}, indent=1))
    return 1 if record["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
