"""Random requests for a soak run, and how they are answered: whole, as a stream, or disturbed on purpose."""

from __future__ import annotations

import itertools
import queue
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

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
SAMPLED = ("sampling", "beam sampling")
BEAM_KINDS = ("beams", "beam sampling")
TOP_K, EARLY_STOPPING = (0, 50), (True, False)


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


def variants(kind: str) -> list[dict[str, Any]]:
    """Arguments that a step is recorded for, of those that `draw_request` draws for a kind: every combination."""
    choices = {
        "top_k": TOP_K if kind in SAMPLED else (),
        "early_stopping": EARLY_STOPPING if kind in BEAM_KINDS else (),
    }
    named = {name: values for name, values in choices.items() if values}
    return [dict(zip(named, values, strict=True)) for values in itertools.product(*named.values())]


def draw_request(dice: random.Random, vocabulary: int, sizes: Sizes, device: Any, **fixed: Any) -> Request:
    """A random request; `fixed` may name its ``kind``, its ``size``, whether that is its ``exact`` length, and its `variants`."""
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
        "do_sample": kind in SAMPLED,
    }
    if fixed.get("exact") or kind in SAMPLED + BEAM_KINDS:  # always: with a least length a step is another one
        arguments["min_new_tokens"] = new if fixed.get("exact") else dice.randint(1, new)
    if arguments["do_sample"]:
        warmer = dice.choice((0.0, 0.51))  # never 1, which Transformers makes a rare variant of its own of
        arguments |= {"temperature": round(dice.uniform(0.5, 0.99) + warmer, 2), "top_k": dice.choice(TOP_K)}
    if kind in BEAM_KINDS:
        arguments |= {"num_beams": BEAMS, "early_stopping": dice.choice(EARLY_STOPPING)}
    arguments |= fixed.get("variant", {})
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
    error = (
        failed.pop() if failed else None
    )  # its frames hold `failed`, and buffers: a cycle that only the collector would break
    if error is not None and not isinstance(error, PlannedError):
        raise error
    return None if error is not None or request.kind == "stream closed early" else [row]
