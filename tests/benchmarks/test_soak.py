"""The soak script: a few seconds of it, and that it notices what it is there to notice."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.soak import Sizes, Soak, Usage, gpu_memory_mb, look_last, main, soak
from tests.conftest import pair_of

SMALL = Sizes(batch=3, source_tokens=24, new_tokens=12)


def test_some_seconds(tmp_path: Any) -> None:
    """Every kind of request is answered or disturbed, compared ones are equal, threads and files stay."""
    hugging_face, ours = pair_of("t5-v1.1")
    seen = soak(ours, hugging_face, SMALL, minutes=0.05, share=0.3)
    assert seen.compared >= 10 and seen.different == []
    assert set(seen.answered) >= {"greedy", "sampling", "beams", "scores", "stream"}
    assert set(seen.disturbed) >= {"stream closed early", "streamer raises", "processor raises"}
    assert not [problem for problem in seen.broken() if "grew" in problem or "differ" in problem]


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face, ours = pair_of("t5-v1.1")
    real = ours.generate
    monkeypatch.setattr(ours, "generate", lambda *a, **k: changed(real(*a, **k)))
    assert any("differ" in problem for problem in soak(ours, hugging_face, SMALL, minutes=0.0).broken())


def changed(result: Any) -> Any:
    tokens = result if isinstance(result, torch.Tensor) else result.sequences
    tokens[0, -1] += 1
    return result


@pytest.mark.parametrize(("growth_mb", "files", "problems"), [(0.0, 0, 0), (20.0, 0, 1), (0.0, 1, 1)])
def test_growth_is_noticed(growth_mb: float, files: int, problems: int) -> None:
    usage = [
        Usage(100 * place, 500 + growth_mb * place / 10, 4, 9 + (files if place > 5 else 0)) for place in range(20)
    ]
    assert len(Soak(usage=usage, warm=2, compared=1).broken()) == problems


@pytest.mark.parametrize("stays", [True, False])
def test_file_that_is_closed_again_is_no_growth(monkeypatch: pytest.MonkeyPatch, stays: bool) -> None:
    monkeypatch.setattr("benchmarks.soak.REST_S", 1.0 if stays else 10.0)
    seen = Soak(usage=[Usage.now(0, False)] * 2, warm=1, compared=1)
    with open(os.devnull) as first, open(os.devnull) as second:
        closing = threading.Timer(0.5, lambda: stays or (first.close(), second.close()))
        closing.start()
        look_last(seen, 1, False)
        grown = seen.grown(seen.usage[-1])
        closing.join()
    assert any("open_files grew" in problem for problem in grown) == stays


def test_status(capsys: pytest.CaptureFixture[str]) -> None:
    """Too short a run has shown nothing."""
    small = ["--batch", "1", "--source-tokens", "4", "--new-tokens", "3"]
    assert main(["--model", "tiny", "--minutes", "0", *small]) == 1
    assert "Run longer" in capsys.readouterr().out


def test_memory_of_one_process_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others on the same GPU do not count; where nothing tells, nothing is judged."""
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 12, 500\necho 7, 100\necho 7, 50\n")
    command.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_memory_mb(7) == pytest.approx(150 * 1.048576)
    assert gpu_memory_mb(8) is None
    command.write_text("#!/bin/sh\necho 7, [N/A]\n")
    assert gpu_memory_mb(7) is None
    usage = [Usage(100 * place, 500, 4, 9, gpu_used_mb=None if place == 5 else 80.0 * place) for place in range(20)]
    assert Soak(usage=usage, warm=2).slope("gpu_used_mb") is None


class MallocInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc: sizes in bytes."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc tells what malloc has given out")
def test_shapes_leave_no_memory_behind() -> None:
    """ONNX Runtime's memory patterns would take 4 MB for these, and more for every larger model."""
    look = ctypes.CDLL(None).mallinfo2
    look.restype = MallocInfo
    encode = pair_of("t5-v1.1")[1].session.encode
    taken = []
    for shapes in ([(16, 40)], itertools.product(range(1, 17), range(1, 20))):
        for shape in shapes:
            encode(torch.ones(shape, dtype=torch.int64), None, torch.ones(shape, dtype=torch.int64))
        gc.collect()
        found = look()
        taken.append((found.uordblks + found.hblkhd) / 1e6)
    assert taken[1] - taken[0] < 1, taken
