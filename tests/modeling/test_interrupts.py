"""Ctrl-C and failures inside every public call: the call that follows works and gives the same as ever."""

from __future__ import annotations

import copy
import gc
import importlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import _GeneratorContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm.std import TqdmDefaultWriteLock
from transformers import AutoTokenizer, TextIteratorStreamer

from t5_trt import TRTT5ForConditionalGeneration, compare, generate_many
from tests.conftest import SHIPPED, pair_of
from tests.tiny_models import batch

MOMENTS = 6  # at which a call is interrupted, spread over the time it takes


@pytest.fixture(scope="module", autouse=True)
def _unlock_tqdm() -> Iterator[None]:
    """An interrupt may leave tqdm's lock, which all bars of a process share, with this thread: others would wait for ever."""
    yield
    for lock in (TqdmDefaultWriteLock.th_lock, TqdmDefaultWriteLock.mp_lock):
        with suppress(AssertionError, RuntimeError):  # once it is free
            while lock is not None:
                lock.release()


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    options: dict[str, Any] = {"backend": "onnxruntime", "num_threads": 1}
    return TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, **options), AutoTokenizer.from_pretrained(SHIPPED)


def calls(shipped: tuple[Any, Any], folder: Path) -> dict[str, Callable[[], Any]]:
    """Name -> a call that gives something to compare."""
    hugging_face, ours = pair_of("t5-v1.1")
    model, tokenizer = shipped
    texts = ["とうきょう", "おおさか", "きょうと"]
    request = {**batch(), "max_new_tokens": 24, "min_new_tokens": 24}

    def loaded(model: Any) -> list[int]:
        return model.generate(**batch(1), max_new_tokens=3).tolist()  # type: ignore[no-any-return]

    def save() -> list[int]:
        ours.save_pretrained(folder / "saved")
        return loaded(TRTT5ForConditionalGeneration.from_pretrained(folder / "saved", num_threads=1))

    def stream() -> list[str]:
        streamer = TextIteratorStreamer(tokenizer, timeout=30)
        model.generate(**tokenizer(texts[:1], return_tensors="pt"), streamer=streamer, max_new_tokens=20)
        return list(streamer)

    return {
        "from_model": lambda: loaded(TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)),
        "from_pretrained": lambda: TRTT5ForConditionalGeneration.from_pretrained(
            SHIPPED, num_threads=1
        ).num_parameters(),
        "save_pretrained": save,
        "forward": lambda: ours(**batch(), decoder_input_ids=torch.zeros(3, 20, dtype=torch.long)).logits.tolist(),
        "greedy": lambda: ours.generate(**request).tolist(),
        "beams": lambda: ours.generate(**request, num_beams=4).tolist(),
        "other loop": lambda: ours.generate(**batch(1), max_new_tokens=24, prompt_lookup_num_tokens=2).tolist(),
        "stream": stream,
        "generate_many": lambda: list(generate_many(model, tokenizer, texts, batch_size=2, max_new_tokens=20)),
        "compare": lambda: compare(model, model.reference, texts, max_new_tokens=12).equal,
        "deepcopy": lambda: loaded(copy.deepcopy(ours)),
    }


NAMES = (
    "from_model", "from_pretrained", "save_pretrained", "forward", "greedy", "beams", "other loop", "stream",
    "generate_many", "compare", "deepcopy",
)  # fmt: skip


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread, as Ctrl-C does, unless the block ends before."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c(shipped: Any, tmp_path: Path, name: str) -> None:
    call = calls(shipped, tmp_path)[name]
    expected = call()
    start = time.perf_counter()
    call()
    took, interrupted = time.perf_counter() - start, 0
    for moment in range(MOMENTS):
        try:
            with interrupted_after(took * (moment + 0.5) / MOMENTS):
                call()
        except KeyboardInterrupt:
            interrupted += 1
        assert call() == expected
    assert interrupted > 0


@pytest.mark.parametrize("name", ["from_model", "from_pretrained"])
@pytest.mark.parametrize("place", ["_pop_mode", "_push_mode"])
@pytest.mark.parametrize("first", range(3))
def test_ctrl_c_between_torchs_modes(
    shipped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str, first: int
) -> None:
    """While ``torch.device("meta")`` is entered, left, or taken away for a torch function, as it once was by chance."""
    call, seen = calls(shipped, tmp_path)[name], 0

    def interrupt(real: Any, *mode: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 1 + first:
            raise KeyboardInterrupt
        return real(*mode)

    for module in ("torch.utils._device", "torch.overrides"):
        real = getattr(importlib.import_module(module), place)
        monkeypatch.setattr(f"{module}.{place}", partial(interrupt, real))
    with pytest.raises(KeyboardInterrupt):
        call()
    monkeypatch.undo()
    assert torch.zeros(1).device.type == "cpu" and not torch.overrides._get_current_function_mode_stack()
    call()


@pytest.mark.parametrize("name", ["from_model", "from_pretrained"])
def test_ctrl_c_in_a_context_manager_of_torch(
    shipped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its generator does not go on then, and puts ``torch.device("meta")`` back when it is freed, which once was any time later."""

    class Interrupted(_GeneratorContextManager):  # type: ignore[type-arg]
        def __exit__(self, *error: Any) -> None:
            raise KeyboardInterrupt

    call, real = calls(shipped, tmp_path)[name], torch.overrides._pop_mode_temporarily
    monkeypatch.setattr("torch.overrides._pop_mode_temporarily", lambda: Interrupted(real.__wrapped__, (), {}))
    with pytest.raises(KeyboardInterrupt) as interrupt:
        call()
    del interrupt
    gc.collect()
    monkeypatch.undo()
    assert torch.zeros(1).device.type == "cpu" and not torch.overrides._get_current_function_mode_stack()
    call()


def test_ctrl_c_that_makes_clean_up_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """shutil closes a folder twice if it is interrupted right after the first time; that error once hid the Ctrl-C."""

    class Interrupted(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            try:
                raise KeyboardInterrupt
            finally:
                os.close(9999)

    def call() -> None:
        model = TRTT5ForConditionalGeneration.from_model(pair_of("t5-v1.1")[0], num_threads=1, decode="engine")
        model.generate(**batch(1), max_new_tokens=3)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        call()
    monkeypatch.undo()
    call()


@pytest.mark.parametrize("method", ["encode", "decode", "generation_step"])
@pytest.mark.parametrize("name", ["forward", "greedy", "beams", "generate_many"])
def test_session_that_fails_once(
    shipped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    """ONNX Runtime throws in a run: the error reaches the caller, and the next call works."""
    call = calls(shipped, tmp_path)[name]
    expected, model = call(), shipped[0] if name == "generate_many" else pair_of("t5-v1.1")[1]
    real, calls_made = getattr(model.session, method), []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls_made.append(method)
        return real(*args, **kwargs)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(model.session, method, count)
    assert call() == expected
    monkeypatch.setattr(model.session, method, fail)
    if calls_made:
        with pytest.raises(RuntimeError, match="planted"):
            call()
    else:  # this call has no use for the method
        assert call() == expected
    monkeypatch.setattr(model.session, method, real)
    assert call() == expected
