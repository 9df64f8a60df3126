"""The engine over the kernels' decoder, as on a GPU: sources encoded ahead, clients told while a step runs. Torch stands in for the kernels."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from t5_trt.errors import BackendError, RequestCancelledError
from t5_trt.runtime.kernel_rows import FetchedTokens
from t5_trt.runtime.row_buffers import RowBuffers
from t5_trt.runtime.row_sources import RowSources, Source, common_size, own_size
from t5_trt.serving import Engine, running
from t5_trt.serving import settings as settings_module
from t5_trt.serving.sources import by_length
from tests.serving_requests import LONG, PATIENCE_S, alone, drawn_settings, source, until
from tests.stand_in_kernels import kernels_pair
from tests.tiny_models import make_hugging_face


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, Any]:
    return kernels_pair(monkeypatch, tmp_path, packs=True)


@pytest.fixture
def ours(pair: tuple[Any, Any]) -> Any:
    return pair[1]


def engine_as_on_a_gpu(ours: Any, **options: Any) -> Engine:
    engine = Engine(ours, **options)
    engine._scheduler._on_gpu = True
    return engine


@pytest.fixture(params=[running.MANY_ROWS, 1], ids=["a step at once", "two steps at once"])
def steps_at_once(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows as few rows, and as if they were many."""
    monkeypatch.setattr(running, "MANY_ROWS", request.param)


@pytest.mark.usefixtures("steps_at_once")
def test_random_requests_get_the_tokens_of_generate_alone(ours: Any) -> None:
    chance = random.Random(3)
    requests = [(source(place, chance.randint(1, 40)), drawn_settings(chance)) for place in range(40)]
    with engine_as_on_a_gpu(ours, max_rows=8) as engine:
        handles = [engine.submit(ids, **settings) for ids, settings in requests]
        results = [handle.result(PATIENCE_S) for handle in handles]
        assert [handle.tokens for handle in handles] == [result[0, 1:].tolist() for result in results]
        until(lambda: engine.stats().running == engine.stats().waiting == 0)
        assert engine.stats().completed == len(requests)
    for (ids, settings), result in zip(requests, results, strict=True):
        assert torch.equal(result, alone(ours, ids, **settings)), settings


def test_more_sources_are_encoded_than_there_are_free_rows(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session, sizes = ours.session, []
    encode = session.encode_rows
    monkeypatch.setattr(
        session, "encode_rows", lambda given: sizes.append([len(ids) for ids, _ in given]) or encode(given)
    )
    with engine_as_on_a_gpu(ours, max_rows=8) as engine:
        long = [engine.submit(source(seed), **LONG) for seed in range(7)]
        until(lambda: engine.stats().running == 7 and engine.stats().steps > 8)
        sizes.clear()
        with engine._scheduler._lock:  # all of them wait before the next look
            made = [engine_job(engine, source(seed, 9 + 20 * seed % 70)) for seed in range(6)]
        for job in made:
            job.wait(None, PATIENCE_S)
        for handle in long:
            handle.cancel()
    # one free row and half of 8: five of them, whatever their lengths; then the rest once those have rows
    assert sizes == [[9, 29, 49, 69, 19], [39]]
    for seed, job in enumerate(made):
        assert torch.equal(job.sequences, alone(ours, source(seed, 9 + 20 * seed % 70), max_new_tokens=6))


def test_an_encoder_of_padded_batches_gets_batches_of_similar_lengths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, ours = kernels_pair(monkeypatch, tmp_path)
    encoder, sizes = ours.session._encoder, []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda *given: sizes.append(tuple(given[0].shape)) or encode(*given))
    lengths = (9, 90, 13, 100, 11)
    with engine_as_on_a_gpu(ours, max_rows=8) as engine:
        with engine._scheduler._lock:
            made = [engine_job(engine, source(length, length)) for length in lengths]
        engine._scheduler._calls.put(None)
        for job in made:
            job.wait(None, PATIENCE_S)
    assert sizes == [(4, 16), (2, 128)]
    for job, length in zip(made, lengths, strict=True):
        assert torch.equal(job.sequences, alone(ours, source(length, length), max_new_tokens=6))


class Held(RowSources):
    """Sources that are not encoded before they are let go."""

    held = threading.Event()
    followed: ClassVar[list[int]] = []

    @property
    def done(self) -> bool:
        return not self.held.is_set()

    def follow(self) -> None:
        self.followed.append(len(self.places))


@pytest.fixture
def held(ours: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The encoder of a GPU that takes as long as this is set."""
    encode = ours.session.encode_rows

    def encode_rows(given: Sequence[Source]) -> Held:
        sources = encode(given)
        return Held(sources.cross, sources.bias, sources.places)

    monkeypatch.setattr(ours.session, "encode_rows", encode_rows)
    Held.held.clear()
    Held.followed.clear()
    return Held.held


def test_rows_decode_while_sources_are_encoded(ours: Any, held: Any) -> None:
    with engine_as_on_a_gpu(ours, max_rows=4) as engine:
        long = engine.submit(source(), **LONG)
        until(lambda: len(long.tokens) > 2)
        held.set()
        late = [engine.submit(source(seed, 9), max_new_tokens=6) for seed in range(2)]
        until(lambda: engine.stats().running == 3)
        steps = engine.stats().steps
        until(lambda: engine.stats().steps > steps + 20)
        assert Held.followed == [1] and not any(handle.tokens for handle in late)
        late[1].cancel()
        held.clear()
        found = late[0].result(PATIENCE_S)
        with pytest.raises(RequestCancelledError):
            late[1].result(PATIENCE_S)
        assert not long.done
    assert torch.equal(found, alone(ours, source(0, 9), max_new_tokens=6))


def test_steps_wait_for_an_encoder_where_no_row_decodes(ours: Any, held: Any) -> None:
    held.set()
    with engine_as_on_a_gpu(ours, max_rows=4) as engine:
        handles = [engine.submit(source(seed, 9), max_new_tokens=6) for seed in range(3)]
        for seed, handle in enumerate(handles):
            assert torch.equal(handle.result(PATIENCE_S), alone(ours, source(seed, 9), max_new_tokens=6))


def test_a_new_request_takes_the_place_of_one_that_is_over(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[int] = []
    remove = RowBuffers.remove
    monkeypatch.setattr(RowBuffers, "remove", lambda rows, row: moves.append(row) or remove(rows, row))
    requests = [(source(seed, 9), 3 + seed % 4) for seed in range(20)]
    with engine_as_on_a_gpu(ours, max_rows=2) as engine:
        handles = [engine.submit(ids, max_new_tokens=count) for ids, count in requests]
        results = [handle.result(PATIENCE_S) for handle in handles]
        until(lambda: engine.stats().running == 0)
    for (ids, count), result in zip(requests, results, strict=True):
        assert torch.equal(result, alone(ours, ids, max_new_tokens=count))
    assert len(moves) <= 4, "only where nobody waits"


def requests_of(lengths: Sequence[int]) -> list[Any]:
    return [SimpleNamespace(input_ids=torch.zeros(1, length)) for length in lengths]


def lengths_of(batches: list[list[Any]]) -> list[list[int]]:
    return [[job.input_ids.shape[1] for job in batch] for batch in batches]


def test_sources_of_similar_lengths_are_encoded_together() -> None:
    jobs = requests_of((500, 9, 40, 33, 10, 200, 300))
    assert lengths_of(by_length(jobs, own_size, 0)) == [[9], [10], [33], [40], [200], [300], [500]]
    assert lengths_of(by_length(jobs, own_size, 20)) == [[9, 10], [33, 40], [200], [300], [500]]
    assert lengths_of(by_length(jobs, own_size, 10**6)) == [[9, 10, 33, 40, 200, 300, 500]]
    assert by_length([], own_size, 5) == []


def test_batches_take_the_fewest_tokens() -> None:
    chance = random.Random(5)
    for _ in range(20):
        lengths, begin_tokens = sorted(chance.randint(1, 300) for _ in range(8)), chance.choice((0, 50, 640))
        found = lengths_of(by_length(requests_of(lengths), common_size, begin_tokens, 1024))
        assert [length for batch in found for length in batch] == lengths
        every_way = [
            [lengths[begin:end] for begin, end in pairwise((0, *cuts, 8))]
            for count in range(8)
            for cuts in combinations(range(1, 8), count)
        ]
        allowed = [way for way in every_way if all(padded(batch) <= 1024 for batch in way)]

        def cost(way: list[list[int]], begin_tokens: int = begin_tokens) -> int:
            return sum(padded(batch) + begin_tokens for batch in way)

        assert found in allowed and cost(found) == min(map(cost, allowed))


def padded(batch: list[int]) -> int:
    rows, tokens = common_size(len(batch), max(batch))
    return rows * tokens


def test_common_sizes_have_steps_of_a_half_or_a_third() -> None:
    assert [common_size(1, tokens)[1] for tokens in (1, 16, 17, 25, 33, 48, 49, 96, 97, 400)] == [
        16, 16, 32, 32, 48, 48, 64, 96, 128, 512,
    ]  # fmt: skip
    assert [common_size(rows, 9)[0] for rows in (1, 2, 3, 5, 16, 17)] == [1, 2, 4, 8, 16, 32]


def engine_job(engine: Engine, ids: list[int]) -> Any:
    """A request, put where waiting ones are; the lock is held."""
    from t5_trt.serving.handle import Job

    given = torch.tensor([ids])
    job = Job(given, torch.ones_like(given), engine._reader.read(None, {"max_new_tokens": 6}), None, None)
    engine._scheduler._waiting.append(job)
    return job


def test_an_encoded_request_that_waits_can_be_cancelled(ours: Any) -> None:
    with engine_as_on_a_gpu(ours, max_rows=4) as engine:
        long = [engine.submit(source(seed), **LONG) for seed in range(3)]
        until(lambda: engine.stats().running == 3)
        with engine._scheduler._lock:
            first, second = (engine_job(engine, source(seed)) for seed in range(2))
            first.prepared = long[0]._job.prepared  # it keeps its row
        until(lambda: len(engine._scheduler._ready) == 1)
        assert engine.stats().waiting == 1
        second.cancelled = True
        second.wait(None, PATIENCE_S)
        assert isinstance(second.error, RequestCancelledError)
        until(lambda: engine.stats().waiting == 0)
        assert engine.stats().running == 4 and not any(handle.done for handle in long)


def test_processors_without_a_device_form_are_called(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "_choice", lambda request: None)
    settings = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "max_new_tokens": 20}
    with engine_as_on_a_gpu(ours, max_rows=2) as engine:
        found = engine.submit(source(), **settings).result(PATIENCE_S)
    assert torch.equal(found, alone(ours, source(), **settings))


def test_a_step_by_an_engine_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from t5_trt import TRTT5ForConditionalGeneration
    from tests.stand_in_tensorrt import stand_in_session

    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), num_threads=1)
    ours.session  # noqa: B018 - takes note of the weights
    ours.session = stand_in_session(ours, monkeypatch)
    with pytest.raises(BackendError, match=r"backend 'tensorrt': .*decode='kernels'.*backend='cuda'"):
        Engine(ours)


def test_two_steps_start_before_the_tokens_of_the_last_one_are_known(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    step, tolist = ours.session.step_rows, FetchedTokens.tolist

    def step_rows(rows: Any, **options: Any) -> torch.Tensor:
        events.append("step")
        return step(rows, **options)

    def read(fetched: FetchedTokens) -> list[int]:
        events.append("read")
        return tolist(fetched)

    monkeypatch.setattr(ours.session, "step_rows", step_rows)
    monkeypatch.setattr(FetchedTokens, "tolist", read)
    with engine_as_on_a_gpu(ours, max_rows=2) as engine:
        greedy = engine.submit(source(), max_new_tokens=5).result(PATIENCE_S)
        until(lambda: engine.stats().running == 0)
        assert events == ["step"] * 3 + ["read", "step"] * 2 + ["read"] * 3
        events.clear()
        engine.submit(source(), max_new_tokens=3, do_sample=True, seed=1).result(PATIENCE_S)
        assert events == ["step", "read"] * 3
        events.clear()
        monkeypatch.setattr(running, "MANY_ROWS", 1)
        greedy_again = engine.submit(source(), max_new_tokens=5).result(PATIENCE_S)
        until(lambda: engine.stats().running == 0)
        assert events == [*["step"] * 4, *["read"] * 2, *["step"] * 2, *["read"] * 4]  # the sixth token is nobody's
    assert torch.equal(greedy, alone(ours, source(), max_new_tokens=5)) and torch.equal(greedy, greedy_again)


@pytest.mark.usefixtures("steps_at_once")
def test_rows_come_and_go_while_steps_are_under_way(ours: Any) -> None:
    """Of every length from one token on; rows that choose stop the steps ahead, and those go on after them."""
    chance = random.Random(7)
    requests = [(source(seed, 3 + seed), {"max_new_tokens": 1 + seed % 5}) for seed in range(30)]
    for place in (11, 12, 25):
        requests[place][1].update(do_sample=True, seed=place)
    with engine_as_on_a_gpu(ours, max_rows=4) as engine:
        handles = []
        for ids, settings in requests:
            handles.append(engine.submit(ids, **settings))
            if chance.random() < 0.3:
                until(lambda: handles[-1].tokens)
        results = [handle.result(PATIENCE_S) for handle in handles]
        until(lambda: engine.stats().running == 0)
        assert engine.stats().tokens == sum(len(handle.tokens) for handle in handles)
    for (ids, settings), result in zip(requests, results, strict=True):
        assert torch.equal(result, alone(ours, ids, **settings))


@pytest.mark.usefixtures("steps_at_once")
def test_requests_that_end_by_their_end_token_get_nothing_behind_it(ours: Any) -> None:
    wanted = []
    for seed in range(12):
        ids = source(seed, 5 + seed)
        made = alone(ours, ids, max_new_tokens=12, eos_token_id=-1)[0].tolist()
        settings = {"max_new_tokens": 12 - seed % 3, "eos_token_id": made[2 + seed % 7]}
        wanted.append((ids, settings, alone(ours, ids, **settings)))
    assert len({result.shape[1] for *_, result in wanted}) > 3
    with engine_as_on_a_gpu(ours, max_rows=3) as engine:
        handles = [engine.submit(ids, **settings) for ids, settings, _ in wanted]
        engine.close(PATIENCE_S)  # which waits for tokens on their way, too
        for handle, (*_, result) in zip(handles, wanted, strict=True):
            assert torch.equal(handle.result(0), result) and handle.tokens == result[0, 1:].tolist()
        assert engine.stats().tokens == sum(result.shape[1] - 1 for *_, result in wanted)
