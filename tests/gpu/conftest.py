"""Everything in this folder needs a GPU and TensorRT, and shares one engine store per run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from tests.tiny_models import make_hugging_face


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the engines of this run; T5_TRT_TEST_STORE keeps them from one run to the next."""
    kept = os.environ.get("T5_TRT_TEST_STORE")
    return Path(kept) if kept else tmp_path_factory.mktemp("engines") / "store"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory for results holds NaN before a kernel writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["kernels", "engine"])
def decode(request: pytest.FixtureRequest) -> str:
    """Who does the decoder step."""
    return str(request.param)


@pytest.fixture(scope="session", params=["kernels", "engine"])
def gpu_pair(store: Path, request: pytest.FixtureRequest) -> Any:
    """(Hugging Face model on the GPU, the same weights on TensorRT) for a kind; made once for either kind of decoder step."""

    @cache
    def make(kind: str, precision: str = "fp32") -> tuple[Any, Any]:
        hugging_face = make_hugging_face(kind)
        ours = TRTT5ForConditionalGeneration.from_model(
            hugging_face, backend="tensorrt", precision=precision, decode=request.param, engine_cache_dir=store
        )
        # sdpa and eager are both float32 here: TF32 is off by default for matrix products
        return make_hugging_face(kind).cuda(), ours

    torch.backends.cuda.matmul.allow_tf32 = False
    return make
