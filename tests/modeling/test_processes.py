"""Threads and processes: many threads on one model, forks, DataLoader workers, a cold store.

Scripts run in interpreters of their own, so that a deadlock is a timeout of one test.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import BackendError, TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from t5_trt.config import BuildConfig, RuntimeConfig
from t5_trt.runtime.open_session import open_session
from t5_trt.runtime.select import Placement
from tests.conftest import ROOT, SHIPPED
from tests.tiny_models import batch, make_hugging_face

HEADER = f"""
import multiprocessing, os, signal, sys, threading, time
import torch
sys.path.insert(0, {str(ROOT)!r})
from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE

SOURCES = torch.tensor([[5, 6, 7, 1], [9, 4, 8, 1]])

def load(**options):
    model = TRTT5ForConditionalGeneration.from_pretrained({str(SHIPPED)!r}, num_threads=2, **options)
    model.generation_config.max_length = None
    return model

def answer(model, **options):
    return model.generate(SOURCES, max_new_tokens=12, **options).tolist()
"""


def run_script(body: str, *, script: Path | None = None, timeout_s: float = 240) -> list[str]:
    """Run a script whose own lines follow `HEADER`; its exit status must be 0. Returns the lines that it printed.

    Spawned processes import the script, so for them it must be a file.
    """
    text = HEADER + textwrap.dedent(body)
    if script is not None:
        script.write_text(text)
    command = [sys.executable, "-c", text] if script is None else [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_forked_while_a_thread_generates() -> None:
    """Children answer as their parent does, and go on with its cache: no pool and no lock of the parent's is used.

    They end as multiprocessing has them end. In a bare os.fork() ``sys.exit`` would hang: ONNX Runtime 1.32 waits there, in a
    destructor, for a thread of the parent's, as soon as it is imported.
    """
    lines = run_script("""
        torch.set_num_threads(2)
        model = load()
        expected = [answer(model), answer(model, num_beams=4)]
        start = torch.zeros(2, 1, dtype=torch.long)
        held = model(SOURCES, decoder_input_ids=start, use_cache=True)
        def child():
            assert [answer(model), answer(model, num_beams=4)] == expected
            token = held.logits[:, -1:].argmax(-1)
            cache = {CACHE: held[CACHE]}
            inputs = dict(encoder_outputs=(held.encoder_last_hidden_state,), attention_mask=torch.ones_like(SOURCES))
            logits = model(**inputs, decoder_input_ids=token, **cache).logits
            whole = model(SOURCES, decoder_input_ids=torch.cat([start, token], 1)).logits
            torch.testing.assert_close(logits[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)
            assert torch.get_num_threads() == 1
        stop = threading.Event()
        def work():
            while not stop.is_set():
                answer(model)
        thread = threading.Thread(target=work)
        thread.start()
        processes = [multiprocessing.get_context("fork").Process(target=child) for _ in range(6)]
        for moment, process in enumerate(processes):
            time.sleep(0.013 * moment)
            process.start()
        for process in processes:
            process.join(60)
        print([process.exitcode for process in processes])
        for process in processes:
            process.kill()
        stop.set()
        thread.join()
        print([answer(model), answer(model, num_beams=4)] == expected)
    """)
    assert lines == ["[0, 0, 0, 0, 0, 0]", "True"]


def test_forked_while_a_thread_computes_a_cached_property() -> None:
    """The child computes its own; Python 3.10 and 3.11 have a lock in `functools.cached_property`, which it would wait for."""
    lines = run_script("""
        from t5_trt.generation.cached_property import cached_property
        class Sums:
            computed = 0
            def __init__(self, waits):
                self.waits = waits
            @cached_property
            def total(self):
                self.computed += 1
                if self.waits:
                    begun.set()
                    forked.wait()
                return 42
        begun, forked = threading.Event(), threading.Event()
        first, second = Sums(True), Sums(False)
        thread = threading.Thread(target=lambda: first.total)
        thread.start()
        begun.wait()
        process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(second.total))
        process.start()
        process.join(60)
        print(process.exitcode)
        process.kill()
        forked.set()
        thread.join()
        print(first.total, first.computed)
    """)
    assert lines == ["42", "42 1"]


def test_data_loader_workers(tmp_path: Path) -> None:
    """The model is in the dataset: inherited by forked workers, pickled for spawned ones, for which torch moves its weights to shared memory."""
    lines = run_script(
        """
        class Answers(torch.utils.data.Dataset):
            def __init__(self, model):
                self.model = model
            def __len__(self):
                return 4
            def __getitem__(self, index):
                return torch.tensor(answer(self.model))
        if __name__ == "__main__":
            model = load()
            expected = answer(model)
            places = [parameter.data_ptr() for parameter in model.parameters()]
            for method in ("fork", "spawn"):
                loader = torch.utils.data.DataLoader(Answers(model), 1, num_workers=2, multiprocessing_context=method)
                print([rows[0].tolist() == expected for rows in loader])
                print(places == [parameter.data_ptr() for parameter in model.parameters()])
                print(answer(model) == expected)
        """,
        script=tmp_path / "loading.py",
    )
    right = "[True, True, True, True]"
    assert lines == [right, "True", "True", right, "False", "True"]


def test_cold_store_of_8_processes(tmp_path: Path) -> None:
    """Rounded weights are made once, and all eight work."""
    lines = run_script(f"""
        def child(queue):
            torch.set_num_threads(1)
            queue.put(answer(load(precision="int8", engine_cache_dir={str(tmp_path / "store")!r})))
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        processes = [context.Process(target=child, args=(queue,)) for _ in range(8)]
        for process in processes: process.start()
        answers = [queue.get(timeout=90) for _ in processes]
        for process in processes: process.join(30)
        print(len(answers), all(each == answers[0] for each in answers), [process.exitcode for process in processes])
    """)
    assert lines == ["8 True [0, 0, 0, 0, 0, 0, 0, 0]"]
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("*/manifest.json")]
    made = sorted(facts.get("graph") or facts["kernels"] for facts in manifests)
    assert made == ["cpu/decode_step.c", "int8 weights"]


def test_moved_to_shared_memory() -> None:
    """share_memory() frees the place where ONNX Runtime read the weights; the model used to crash there."""
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1", d_model=256, d_ff=512), num_threads=1)
    request = {**batch(), "max_new_tokens": 8}
    expected = ours.generate(**request).tolist()
    held = ours(**batch(), decoder_input_ids=torch.zeros(3, 1, dtype=torch.long), use_cache=True)
    session, places = ours.session, [parameter.data_ptr() for parameter in ours.parameters()]
    ours.share_memory()
    assert [parameter.data_ptr() for parameter in ours.parameters()] != places
    assert ours.generate(**request).tolist() == expected
    assert ours.session is not session
    again = ours(**batch(), decoder_input_ids=held.logits.argmax(-1), **{CACHE: held[CACHE]}, use_cache=True)
    assert again.logits.isfinite().all()


def test_eight_threads_on_one_model() -> None:
    """generate() of several kinds, forward and the encoder at once, the engines being opened by whoever comes first."""
    hugging_face = make_hugging_face("t5-v1.1")
    inputs, more = batch(), {"max_new_tokens": 10}
    prompt = torch.randint(2, 200, (3, 5), generator=torch.Generator().manual_seed(0))
    kinds = [
        lambda model: model.generate(**inputs, **more),
        lambda model: model.generate(**inputs, **more, num_beams=4, num_return_sequences=2),
        lambda model: model.generate(**inputs, **more, repetition_penalty=1.3, no_repeat_ngram_size=2),
        lambda model: model.generate(**inputs, max_new_tokens=70, min_new_tokens=70),
        lambda model: model(**inputs, decoder_input_ids=prompt).logits,
        lambda model: model(**inputs, labels=prompt).loss,
        lambda model: model.encoder(**inputs).last_hidden_state,
        lambda model: model.generate(input_ids=inputs["input_ids"][:1], **more, do_sample=False),
    ]
    with torch.no_grad():
        expected = [kind(hugging_face) for kind in kinds]

    def work(index: int) -> list[Any]:
        with torch.no_grad():
            return [kinds[(index + turn) % len(kinds)](ours) for turn in range(2 * len(kinds))]

    for _ in range(2):
        ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(work, range(8)))
        for index, results in enumerate(answers):
            for turn, result in enumerate(results):
                torch.testing.assert_close(result, expected[(index + turn) % len(kinds)], atol=1e-4, rtol=1e-4)


def test_tensorrt_in_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    placement = Placement("tensorrt", "fp16", torch.device("cuda:0"), torch.float16, "tensorrt", "")
    arch: Any = None
    with pytest.raises(BackendError, match="spawn"):
        open_session(arch, {}, RuntimeConfig(), placement, BuildConfig(), lambda: None)  # type: ignore[arg-type, return-value]
