"""torch's threads while tokens are decoded on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.runtime.torch_threads import one_torch_thread
from tests.conftest import SHIPPED


class Watching:
    """A streamer, or a custom logits processor, that notes torch's number of threads."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, tokens: Any) -> None:
        self.seen.append(torch.get_num_threads())

    def end(self) -> None:
        self.seen.append(torch.get_num_threads())

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.get_num_threads())
        return scores


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return TRTT5ForConditionalGeneration.from_pretrained(str(SHIPPED), backend="onnxruntime", num_threads=1)


def test_only_the_calling_thread_is_limited_and_only_inside() -> None:
    other: list[int] = []
    with pytest.raises(ZeroDivisionError), one_torch_thread():
        assert torch.get_num_threads() == 1
        thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        raise ZeroDivisionError
    assert other == [2] and torch.get_num_threads() == 2


@pytest.mark.parametrize(("rows", "expected"), [(2, 1), (9, 2)])
def test_few_rows_leave_the_cores_to_the_steps(model: Any, rows: int, expected: int) -> None:
    """Many rows choose their tokens with all threads. What the caller sees before and after is as it was."""
    streamer = Watching()
    ids = torch.arange(4, 4 + rows)[:, None].repeat(1, 4)
    model.generate(ids, max_new_tokens=3, min_new_tokens=3, streamer=streamer)
    assert streamer.seen == [2, expected, expected, expected, 2]


def test_user_code_in_the_loop_has_all_threads(model: Any) -> None:
    processor = Watching()
    processors = LogitsProcessorList([processor])
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, logits_processor=processors)
    assert processor.seen == [2, 2, 2]
