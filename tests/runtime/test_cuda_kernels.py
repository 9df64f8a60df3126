"""The CUDA kernels' own logic, compiled for the CPU: threads one after the other. tests/gpu runs them on a GPU."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.errors import BackendError
from t5_trt.generation import report_reader
from t5_trt.generation.beam_search import BeamRules, BeamSelector
from t5_trt.generation.processors import CapturableProcessors
from t5_trt.generation.report_reader import Watcher
from t5_trt.generation.sampling import RowTokenSelector, StopTokens
from t5_trt.runtime import cuda_kernels
from t5_trt.runtime.session import Mailbox
from t5_trt.runtime.step_buffers import reorder_rows
from tests.cases import CORE, MORE, OTHER_LOOP, assert_same, hugging_face_result, run
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import make_hugging_face


@pytest.mark.parametrize(("entries", "unused", "beams"), [(1, 0, 4), (3, 1, 2), (2, 0, 5), (1, 0, 16)])
def test_rows_change_places(on_cpu: None, entries: int, unused: int, beams: int) -> None:
    generator = torch.Generator().manual_seed(entries * 100 + beams)
    rows = (entries + unused) * beams
    kv = torch.randn((3, 2, rows, 3, 32, 24), generator=generator).half()
    offset = torch.arange(entries)[:, None] * beams
    for filled in (0, 7, 31):
        parents = (torch.randint(0, beams, (entries, beams), generator=generator) + offset).flatten()
        position, before, expected = torch.tensor([filled]), kv.clone(), kv.clone()
        reorder_rows(expected, parents, position, beams)
        assert cuda_kernels.reorder_rows(kv, parents, position, beams)
        assert torch.equal(kv[..., : filled + 1, :], expected[..., : filled + 1, :])
        assert torch.equal(kv[..., filled + 1 :, :], before[..., filled + 1 :, :])


def test_kernel_refuses_unsupported_shapes(on_cpu: None) -> None:
    parents, position = torch.arange(4), torch.tensor([3])
    assert not cuda_kernels.reorder_rows(torch.zeros(1, 2, 4, 1, 8, 4).half(), parents, position, 4)  # 8 bytes
    assert not cuda_kernels.reorder_rows(torch.zeros(1, 2, 4, 1, 8, 8), parents, position, 1)
    assert not cuda_kernels.reorder_rows(torch.zeros(1, 2, 6, 1, 8, 8), parents, position, 4)


NAMES = [name for name in {**CORE, **MORE} if name not in OTHER_LOOP]


@pytest.fixture(scope="module")
def on_stand_in() -> Iterator[Any]:
    """A T5 v1.1 model on the TensorRT session."""
    with pytest.MonkeyPatch.context() as patch:
        ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), num_threads=1)
        ours.session = stand_in_session(ours, patch)
        yield ours


@pytest.mark.parametrize("name", NAMES)
def test_generates_as_hugging_face(steps: list[bool], v11: Any, name: str) -> None:
    """Tokens, scores and beam indices."""
    assert_same(run(v11[1], {**CORE, **MORE}[name]), hugging_face_result(name))
    assert all(steps)


@pytest.mark.parametrize("name", [name for name in NAMES if "do_sample" not in {**CORE, **MORE}[name]])
def test_token_selection_with_padding_rows(steps: list[bool], on_stand_in: Any, name: str) -> None:
    """Three batch entries on engines of four."""
    assert_same(run(on_stand_in, {**CORE, **MORE}[name]), hugging_face_result(name))
    assert all(steps)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_rows_behind_the_request_change_nothing(request: Any, by_kernel: bool, early_stopping: bool | str) -> None:
    """Nor do they let a search go on: they never end by themselves here, and those of the request do, one by one."""
    if by_kernel:
        request.getfixturevalue("steps")
    rules = BeamRules(2, 4, 1.0, early_stopping, False, False, (1,), 0)
    exact, more = (
        BeamSelector(entries, 64, CapturableProcessors([]), rules, device=torch.device("cpu")) for entries in (3, 5)
    )
    for selector in (exact, more):
        selector.begin(torch.zeros((6, 1), dtype=torch.int64), 40, 40)
    generator = torch.Generator().manual_seed(0)
    for place in range(39):
        logits = torch.randn((10, 12), generator=generator)
        logits[:6, 1] += 0.5 * place
        logits[6:, 1] = -50.0
        results = [selector.advance(logits[: selector.rows], torch.tensor([place])) for selector in (exact, more)]
        assert all(torch.equal(a, b[:6]) for a, b in zip(*results, strict=True))
        assert torch.equal(exact.report, more.report[:4])
    assert exact.report[0] == 1 and exact.tokens.count_nonzero() < 6 * 39
    assert all(torch.equal(a, b[:3]) for a, b in zip(exact.results(0), more.results(0), strict=True))


@pytest.mark.parametrize("beams", [1, 2])
def test_reports_arrive_in_the_mailbox(steps: list[bool], beams: int) -> None:
    """The newest ones, each by its position, and none of an earlier request."""
    cpu, rules = torch.device("cpu"), BeamRules(2, 4, 1.0, False, False, False, (1,), 0)
    selector: Any = (
        RowTokenSelector(3, 64, CapturableProcessors([]), StopTokens((1,), 0), do_sample=False, device=cpu)
        if beams == 1
        else BeamSelector(3, 64, CapturableProcessors([]), rules, device=cpu)
    )
    for _ in range(2):
        selector.begin(torch.zeros((3 * beams, 1), dtype=torch.int64), *(() if beams == 1 else (60, 60)))
        assert all(selector.mailbox.find(position) is None for position in range(64))
        for place in range(20):
            selector.advance(torch.randn(3 * beams, 12), torch.tensor([place]))
            assert torch.equal(selector.mailbox.find(place + 1), selector.report)
            assert selector.mailbox.find(place + 2) is None
    assert selector.mailbox.in_use


def test_mailbox_reports_are_returned_in_order() -> None:
    selector: Any = SimpleNamespace(report=torch.zeros(2, dtype=torch.int64), mailbox=Mailbox(2, torch.device("cpu")))
    selector.mailbox.in_use = True
    selector.mailbox.start_anew()
    watcher = Watcher(selector)
    watcher._ahead = 2
    for position in (1, 2, 3):
        watcher.post(selector, position)
    for position in (2, 1):  # as if the second one had been seen first
        selector.mailbox.memory[position, 1:] = position
        selector.mailbox.memory[position, 0] = (1 << 32) + position
    assert [report.tolist() for report in watcher.take()] == [[1, 1], [2, 2]]
    assert watcher.take() == []


def test_report_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the GPU has nothing left to do; while it works, the host waits."""
    selector: Any = SimpleNamespace(report=torch.zeros(2, dtype=torch.int64), mailbox=Mailbox(2, torch.device("cpu")))
    selector.mailbox.in_use = True
    answers = [False, False, True]
    monkeypatch.setattr(report_reader, "PATIENCE", 0.0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(query=lambda: answers.pop(0)))
    watcher = Watcher(selector)
    watcher.post(selector, 7)
    with pytest.raises(BackendError, match="without the report of token 7"):
        watcher.take(all_of_them=True)
    assert answers == []


def test_without_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """torch does the work, and nothing is missing."""
    assert cuda_kernels._function("reorder_rows", None, (("BEAMS", 2),)) is None
    assert not caplog.records


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    for known in (cuda_kernels._function, cuda_kernels._warn_once):
        known.cache_clear()
    yield
    cuda_kernels._function.cache_clear()


@pytest.mark.parametrize(("built_for", "extra"), [("12.6", "kernels-cu12"), ("13.0", "kernels-cu13")])
def test_missing_packages_are_logged_once(
    nothing_compiled: None, monkeypatch: pytest.MonkeyPatch, caplog: Any, built_for: str, extra: str
) -> None:
    """With the command that brings them, however many kernels there are."""
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    for name in ("reorder_rows", "beam_step", "token_step"):
        assert cuda_kernels._function(name, 0, ()) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f'`pip install "t5-trt[{extra}]"`' in record.getMessage()


def test_missing_library_is_logged(nothing_compiled: None, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """cuda.bindings is there, NVRTC is not."""

    def create(*_: Any) -> Any:
        raise RuntimeError("Failure finding libnvrtc.so: no such file.")

    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", ModuleType("driver"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", SimpleNamespace(nvrtcVersion=create))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    assert cuda_kernels._function("reorder_rows", 0, (("BEAMS", 2),)) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "finding libnvrtc.so: no such file. They" in record.getMessage()
