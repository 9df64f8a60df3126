"""The engine on a GPU: requests share the kernels' steps, and each gets what `generate()` alone would give it. No TensorRT is needed."""

from __future__ import annotations

import random
import threading
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.errors import BackendError, RequestCancelledError
from t5_trt.serving import Engine
from t5_trt.serving.choice import TokenChoice
from t5_trt.serving.handle import Job
from t5_trt.serving.rows import Row
from t5_trt.serving.settings import SettingsReader
from tests.gpu.encoder_cases import error
from tests.row_cases import Alone
from tests.row_cases import step as row_step
from tests.serving_requests import LONG, PATIENCE_S, drawn_settings, source, until
from tests.tiny_models import VOCAB, make_hugging_face

REQUESTS = 200


@pytest.fixture(scope="module")
def model_of(store: Path) -> Any:
    """A model on the backend "cuda" by kind and precision; made once."""

    @cache
    def make(kind: str = "t5-v1.1", precision: str = "fp32") -> Any:
        return TRTT5ForConditionalGeneration.from_model(
            make_hugging_face(kind), backend="cuda", precision=precision, engine_cache_dir=store
        )

    torch.backends.cuda.matmul.allow_tf32 = False
    return make


def alone(model: Any, ids: list[int], seed: int | None = None, **settings: Any) -> torch.Tensor:
    """What the request gives without the engine."""
    if seed is not None:
        torch.manual_seed(seed)
    made: torch.Tensor = model.generate(torch.tensor([ids]).cuda(), **settings)
    return made.cpu()


#: one step of all rows, whose logits are those of each row's own, bit for bit
step = partial(row_step, atol=0.0)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_rows_have_the_bits_of_a_cache_of_their_own(model_of: Any, precision: str) -> None:
    """They join and leave between steps; caches and sources outgrow their first room."""
    session = model_of(precision=precision).session
    rows = session.row_buffers(12)
    alone_ones = [
        Alone(session, length, seed) for seed, length in enumerate((3, 200, 40, 17, 129, 2, 64, 30, 5, 300, 128))
    ]
    inside: list[Alone] = []
    for each in alone_ones:
        each.enter(rows)
        inside.append(each)
        for _ in range(3):
            step(session, rows, inside)
    for place in (4, 0, len(inside) - 3):  # the last row takes the place
        rows.remove(place)
        inside[place] = inside[-1]
        inside.pop()
        step(session, rows, inside)
    for _ in range(120):
        step(session, rows, inside)
    late = Alone(session, 33, 99)
    late.enter(rows)
    step(session, rows, [*inside, late])
    assert rows.capacity == 256 and rows.source_capacity == 512


def test_many_rows_have_the_bits_of_few(model_of: Any) -> None:
    """Every number of rows at which other kernels are used."""
    session = model_of(precision="fp16").session
    rows = session.row_buffers(80)
    inside: list[Alone] = []
    for count in (7, 15, 31, 33, 63, 66, 80):
        while len(inside) < count:
            inside.append(Alone(session, 2 + 3 * len(inside) % 150, len(inside)))
            inside[-1].enter(rows)
        for _ in range(2):
            step(session, rows, inside)
    while len(inside) > 5:
        rows.remove(1)
        inside[1] = inside[-1]
        inside.pop()
    step(session, rows, inside)


def test_a_row_taken_over_has_the_bits_of_a_cache_of_its_own(model_of: Any) -> None:
    session = model_of(precision="fp16").session
    rows, inside = session.row_buffers(3), [Alone(session, length, length) for length in (12, 150, 7)]
    for each in inside:
        each.enter(rows)
    for _ in range(3):
        step(session, rows, inside)
    inside[1] = Alone(session, 9, 5)
    rows.add(inside[1].kv, inside[1].bias, 1)
    for _ in range(3):
        step(session, rows, inside)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sources_are_encoded_beside_steps_without_waiting(model_of: Any, precision: str) -> None:
    """The values are those of each source alone, and the host waits for nothing once a size is captured."""
    session = model_of(precision=precision).session
    sources = [(np.array(source(length, length)), np.ones(length, np.int64)) for length in (32, 5, 64, 17)]
    sources[2][1][20:] = 0
    for _ in range(2):  # the second one is captured
        session.encode_rows(sources)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = session.encode_rows(sources)
        made.follow()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    copied = [(cross.clone(), bias.clone()) for cross, bias in made.split()]
    for (ids, mask), (cross, bias) in zip(sources, copied, strict=True):
        given = torch.from_numpy(mask)[None].cuda()
        _, alone = session.encode(torch.from_numpy(ids)[None].cuda(), None, given)
        assert error(cross, alone.kv[:, :, 0]) < (1e-5 if precision == "fp32" else 1e-2)
        assert torch.equal(bias, session.cross_bias(given, alone)[0, 0, 0])
    assert made.done


def test_rows_decode_while_the_encoder_is_busy(model_of: Any) -> None:
    ours = model_of()
    wanted = alone(ours, source(1, 20), max_new_tokens=9)
    with Engine(ours, max_rows=4) as engine:
        for _ in range(3):
            engine.submit(source(1, 20), max_new_tokens=9).result(PATIENCE_S)
        long = engine.submit(source(), **LONG)
        until(lambda: len(long.tokens) > 5)
        with ours.session._encoder.beside.current():
            torch.cuda._sleep(1_000_000_000)  # about half a second
        late, before = engine.submit(source(1, 20), max_new_tokens=9), len(long.tokens)
        until(lambda: len(long.tokens) > before + 100)
        assert not late.tokens
        assert torch.equal(late.result(PATIENCE_S), wanted)


def test_engines_of_two_models_run_side_by_side(model_of: Any) -> None:
    """Each with an encoder's stream of its own, beside `generate()` on the default stream."""
    models = [model_of("t5-v1.1"), model_of("t5-v1.0")]
    requests = [source(seed, 5 + 9 * seed) for seed in range(24)]
    wanted = [[alone(model, ids, max_new_tokens=20) for ids in requests] for model in models]
    with Engine(models[0], max_rows=6) as first, Engine(models[1], max_rows=6) as second:
        for _ in range(3):
            handles = [[engine.submit(ids, max_new_tokens=20) for ids in requests] for engine in (first, second)]
            for model, results in zip(models, wanted, strict=True):
                assert torch.equal(alone(model, requests[9], max_new_tokens=20), results[9])
            for mine, results in zip(handles, wanted, strict=True):
                for handle, result in zip(mine, results, strict=True):
                    assert torch.equal(handle.result(PATIENCE_S), result)


def test_best_tokens_are_those_of_the_logits(model_of: Any) -> None:
    session = model_of(precision="fp16").session
    rows, inside = session.row_buffers(5), [Alone(session, length, length) for length in (3, 150, 9)]
    tokens = [5, 6, 7]
    for each in inside:
        each.enter(rows)
    for number in range(12):
        rows.fit()
        if number % 3 == 1:
            rows.follow()
        else:
            rows.feed(tokens)
        found = session.step_rows(rows, best_only=number % 3 < 2)
        chosen = found.tolist() if number % 3 < 2 else found.argmax(-1).tolist()
        expected = [int(each.logits(token).argmax()) for each, token in zip(inside, tokens, strict=True)]
        assert chosen == expected
        tokens = chosen


def test_a_step_and_the_choice_of_tokens_wait_for_nothing(model_of: Any) -> None:
    """But for the one copy of all tokens, which is not made here."""
    ours = model_of()
    session, reader = ours.session, SettingsReader(ours)
    rows, each = session.row_buffers(4), Alone(session, 20, 0)
    each.enter(rows)
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2}
    prepared = reader.read(None, {**sampled, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "max_new_tokens": 30})
    ids, choice = torch.tensor([source()]), TokenChoice(VOCAB, 8, session.device)
    failures: dict[int, Exception] = {}
    row = Row(Job(ids, torch.ones_like(ids), prepared, 3, None))
    for best_only in (True, False, True, False):  # the first two are captured
        rows.fit()
        rows.feed([4])
        session.step_rows(rows, best_only=best_only)
    choice(session.step_rows(rows), [row], failures)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows.fit()
        rows.feed([4])
        session.step_rows(rows, best_only=True)
        rows.feed([4])
        chosen = choice(session.step_rows(rows), [row], failures)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 <= int(chosen) < VOCAB and not failures


def test_many_rows_get_the_tokens_of_generate_alone(model_of: Any) -> None:
    """Two steps start at once; some requests end by an end token, others by their length, and some leave."""
    ours, chance = model_of(), random.Random(11)
    requests = []
    for seed in range(120):
        ids = source(seed, chance.randint(1, 150))
        requests.append((ids, {"max_new_tokens": chance.randint(1, 40), "eos_token_id": chance.randrange(VOCAB)}))
    with Engine(ours, max_rows=48, max_waiting=200) as engine:
        handles = [engine.submit(ids, **settings) for ids, settings in requests]
        for place in range(5, 120, 17):
            handles[place].cancel()
        for place, (handle, (ids, settings)) in enumerate(zip(handles, requests, strict=True)):
            if place % 17 != 5:
                made = handle.result(PATIENCE_S)
                assert torch.equal(made, alone(ours, ids, **settings)) and handle.tokens == made[0, 1:].tolist()
        until(lambda: engine.stats().running == 0)


def test_random_requests_get_the_tokens_of_generate_alone(model_of: Any) -> None:
    """More requests than rows, mixed lengths and settings, from two threads; some are cancelled."""
    ours, chance = model_of(), random.Random(5)
    requests = [
        (source(place, chance.randint(1, 200)), drawn_settings(chance), chance.random() < 0.15)
        for place in range(REQUESTS)
    ]
    found: list[Any] = [None] * REQUESTS
    engine = Engine(ours, max_rows=24, max_waiting=REQUESTS)

    def client(first: int) -> None:
        mine = range(first, REQUESTS, 2)
        handles = [engine.submit(requests[place][0], **requests[place][1]) for place in mine]
        for place, handle in zip(mine, handles, strict=True):
            if requests[place][2]:
                handle.cancel()
            try:
                found[place] = handle.result(PATIENCE_S)
                assert handle.tokens == found[place][0, 1:].tolist()
            except RequestCancelledError:
                assert requests[place][2]

    threads = [threading.Thread(target=client, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    until(lambda: engine.stats().running == engine.stats().waiting == 0)
    stats = engine.stats()
    engine.close()
    assert stats.completed + stats.cancelled == REQUESTS and stats.failed == 0 and stats.cancelled > 0
    differing = []
    for place, (ids, settings, cancelled) in enumerate(requests):
        assert found[place] is not None or cancelled
        if found[place] is not None and not torch.equal(found[place], alone(ours, ids, **settings)):
            differing.append((place, settings))
    assert not differing


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_seeds_draw_what_generate_draws(model_of: Any, precision: str) -> None:
    """One at a time, so that every source is encoded alone: in half precision, too, all is equal then."""
    ours, ids = model_of(precision=precision), source(1, 32)  # of a size that is not padded further
    settings = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "max_new_tokens": 25}
    with Engine(ours, max_rows=3) as engine:
        long = engine.submit(source(2, 50), **LONG)
        for seed in range(4):
            found = engine.submit(ids, seed=seed, **settings).result(PATIENCE_S)
            assert torch.equal(found, alone(ours, ids, seed, **settings)), seed
        assert not long.done


def test_long_output_grows_its_cache_beside_others(model_of: Any) -> None:
    ours, options = model_of("t5-v1.0"), {"max_new_tokens": 400, "min_new_tokens": 400}
    with Engine(ours, max_rows=4) as engine:
        long = engine.submit(source(0, 9), **options)
        until(lambda: len(long.tokens) > 5)
        short = [engine.submit(source(seed, 7 * seed), max_new_tokens=20) for seed in range(1, 9)]
        results = [handle.result(PATIENCE_S) for handle in short]
        result = long.result(PATIENCE_S)
    assert torch.equal(result, alone(ours, source(0, 9), **options))
    for seed, found in enumerate(results, 1):
        assert torch.equal(found, alone(ours, source(seed, 7 * seed), max_new_tokens=20))


def test_requests_with_beams_run_together_and_leave_between_captured_steps(model_of: Any) -> None:
    model = model_of()
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 24}
    sources = [source(seed, 30) for seed in range(4)]
    with Engine(model, max_rows=12) as engine:
        for _ in range(3):
            leaves = engine.submit(source(), num_beams=3, **LONG)
            until(lambda: engine.stats().running == 1 and not engine.stats().waiting)
            handles = [engine.submit(ids, **settings) for ids in sources]
            leaves.cancel()
            with pytest.raises(RequestCancelledError):
                leaves.result(PATIENCE_S)
            found = [handle.result(PATIENCE_S) for handle in handles]
            assert all(map(torch.equal, found, [alone(model, ids, **settings) for ids in sources]))


def test_generate_runs_beside_the_engine(model_of: Any) -> None:
    """In another thread and on another stream, with captures of its own."""
    ours = model_of()
    wanted = {seed: alone(ours, source(seed, 5 + seed), max_new_tokens=40) for seed in range(12)}
    wrong: list[int] = []

    def generate() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(12):
                made = ours.generate(torch.tensor([source(seed, 5 + seed)] * (1 + seed)).cuda(), max_new_tokens=40)
                if not torch.equal(made[:1].cpu(), wanted[seed]):
                    wrong.append(seed)

    thread = threading.Thread(target=generate)
    with Engine(ours, max_rows=6) as engine:
        thread.start()
        for _ in range(3):
            handles = [engine.submit(source(seed, 5 + seed), max_new_tokens=40) for seed in range(12)]
            for seed, handle in enumerate(handles):
                assert torch.equal(handle.result(PATIENCE_S), wanted[seed])
        thread.join(PATIENCE_S)
    assert not thread.is_alive() and not wrong


def test_the_engine_survives_memory_that_runs_out(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model_of()
    with Engine(ours, max_rows=4) as engine:
        wanted = engine.submit(source(), max_new_tokens=9).result(PATIENCE_S)
        with monkeypatch.context() as patch:

            def full(*_: Any, **__: Any) -> Any:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

            patch.setattr(type(ours.session._steps), "step_rows", full)
            handles = [engine.submit(source(seed, 9), max_new_tokens=150) for seed in range(4)]
            for handle in handles:
                with pytest.raises(BackendError, match="GPU memory ran out"):
                    handle.result(PATIENCE_S)
        assert torch.equal(engine.submit(source(), max_new_tokens=9).result(PATIENCE_S), wanted)


def test_tensorrt_with_the_kernels_serves_rows_and_without_them_says_what_to_do(store: Path) -> None:
    pytest.importorskip("tensorrt")  # a part of the tests runs where there is none
    options: dict[str, Any] = {"backend": "tensorrt", "precision": "fp32", "engine_cache_dir": store}
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), decode="kernels", **options)
    with Engine(ours, max_rows=4) as engine:
        handles = [engine.submit(source(seed, 12), max_new_tokens=20) for seed in range(3)]
        for seed, handle in enumerate(handles):
            assert torch.equal(handle.result(5 * PATIENCE_S), alone(ours, source(seed, 12), max_new_tokens=20))
    with pytest.raises(BackendError, match=r"backend 'tensorrt': .*decode='kernels'"):
        Engine(TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), decode="engine", **options))


@pytest.mark.parametrize("others", [False, True])
def test_rows_of_all_settings_get_the_tokens_of_generate_alone(model_of: Any, others: bool) -> None:
    """By the kernels of the choice, steps ahead of the host; with `others` beside rows that the host must look at before each step."""
    ours, chance = model_of(), random.Random(5)
    kinds: list[dict[str, Any]] = [
        {},
        {"min_new_tokens": 12},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.9},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "repetition_penalty": 1.2, "min_new_tokens": 5},
    ]
    kinds += [{"exponential_decay_length_penalty": (3, 1.2)}, {"do_sample": True, "min_p": 0.1}] if others else []
    requests = [
        (source(seed, chance.randint(1, 90)), {**chance.choice(kinds), "max_new_tokens": chance.randint(1, 60)})
        for seed in range(100)
    ]
    with Engine(ours, max_rows=40, max_waiting=200) as engine:
        handles = [engine.submit(ids, seed=seed, **each) for seed, (ids, each) in enumerate(requests)]
        found = [handle.result(PATIENCE_S) for handle in handles]
        assert len(engine._scheduler._running._choice._ruled._free) == 40
    for seed, ((ids, each), tokens) in enumerate(zip(requests, found, strict=True)):
        assert torch.equal(tokens, alone(ours, ids, seed, **each)), each
