"""CUDA graphs on a real GPU: all that ought to be captured is, and a recording that fails costs speed only.

The first thing to run on a new GPU or TensorRT: nearly everything else depends on it.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.generation.sampling import RowTokenSelector
from t5_trt.runtime.cuda_graph import CaptureError, GraphMemory, capture
from tests.gpu.cases import idle_slots
from tests.tiny_models import batch, make_hugging_face


def on_gpu(rows: int = 3) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in batch(rows).items()}


def model(store: Path, hugging_face: Any, decode: str) -> Any:
    options = {"backend": "tensorrt", "precision": "fp32", "decode": decode}
    return TRTT5ForConditionalGeneration.from_model(hugging_face, **options, engine_cache_dir=store)


def test_everything_is_captured(store: Path, decode: str, caplog: pytest.LogCaptureFixture) -> None:
    ours = model(store, make_hugging_face("t5-v1.1"), decode)
    with caplog.at_level(logging.WARNING, "t5_trt"):
        for arguments in 2 * ({}, {"num_beams": 4}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}):
            ours.generate(**on_gpu(), max_new_tokens=9, **arguments)
    assert "captured" not in caplog.text
    steps = [step for slot in idle_slots(ours.session) for step in slot.steps.values()]
    graphs = [step.graph for step in steps] + [kept.graph for kept in ours.session._encoders._captured.values()]
    assert len(graphs) == 4 and all(isinstance(graph, torch.cuda.CUDAGraph) for graph in graphs)


@pytest.mark.parametrize("shared", [True, False])
def test_capture_that_fails(shared: bool) -> None:
    """Torch itself then leaves its allocator recording, its generator unable to draw, and another stream the current one."""
    device, before = torch.device("cuda", torch.cuda.current_device()), torch.cuda.current_stream()
    memory = GraphMemory() if shared else None
    counter = torch.zeros(4, device=device)

    def count() -> None:
        counter.add_(torch.rand_like(counter).ceil())

    def wait() -> None:
        count()
        counter.sum().item()

    for _ in range(2):
        with pytest.raises(CaptureError):
            capture(wait, device, memory)
        assert torch.cuda.current_stream() == before
        torch.manual_seed(0)
        first = torch.rand(5, device=device)
        graph = capture(count, device, memory)
        counter.zero_()
        for _ in range(3):
            graph.replay()
        assert counter.tolist() == [3.0] * 4
        torch.manual_seed(0)
        assert torch.equal(first, torch.rand(5, device=device))
    taken = torch.cuda.memory_reserved()
    large = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= taken


def test_token_selection_that_cannot_be_captured_runs_after_the_step(
    store: Path, decode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, advance = model(store, make_hugging_face("t5-v1.1"), decode), RowTokenSelector.advance

    def wait(selector: RowTokenSelector, logits: torch.Tensor, *others: Any) -> Any:
        logits.sum().item()
        return advance(selector, logits, *others)

    monkeypatch.setattr(RowTokenSelector, "advance", wait)
    hugging_face = make_hugging_face("t5-v1.1").cuda()  # of its own: ours shares the parameters that it was made from
    for arguments in ({}, {"num_beams": 4}, {}, {"do_sample": True}):
        results = []
        for each in (ours, hugging_face):
            torch.manual_seed(3)
            results.append(each.generate(**on_gpu(), max_new_tokens=12, **arguments).tolist())
        assert results[0] == results[1]
    assert caplog.text.count("the token selection is not captured") == 2  # greedy and drawn; beams are captured


def test_draws_beside_captures(store: Path, decode: str) -> None:
    """While a thread records for one model, another one draws for another: torch's generator refuses that by itself."""
    drawing, recording = (model(store, make_hugging_face("t5-v1.1", seed=seed), decode) for seed in (0, 4))
    inputs = on_gpu()

    def draw(times: int) -> list[Any]:
        request = {**inputs, "do_sample": True, "max_new_tokens": 20, "min_new_tokens": 20}
        return [drawing.generate(**request).shape for _ in range(times)]

    draw(1)
    recording.generate(**inputs, max_new_tokens=5)
    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(draw, 30)
        for _ in range(10):
            recording.session._forget()  # all of it is captured anew
            recording.generate(**inputs, max_new_tokens=5)
        assert set(drawn.result()) == {torch.Size([3, 21])}
