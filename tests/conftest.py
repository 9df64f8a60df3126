"""Fixtures: a Hugging Face model and the same model on engines, for every kind; the shipped model."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# as in pyproject.toml, for the processes that tests start
os.environ["PYTHONWARNINGS"] = "error::DeprecationWarning,error::PendingDeprecationWarning,error::FutureWarning"

import transformers

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.config import default_engine_cache_dir
from t5_trt.kernels import cpu_compile
from tests.tiny_models import KINDS, make_hugging_face

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "examples" / "kana_romaji"
#: the files that take longest. They start first, so that no process of xdist is left alone with one of them at the end
LONG_FILES = (
    "test_install.py", "test_ray_serve.py", "test_ray.py", "test_kernel_compile.py", "test_encoder_kernels.py", "test_rtx_build.py",
    "test_examples.py", "test_properties.py", "test_processes.py", "test_generate_parity.py", "test_decode_loop.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """Modules and tests live to the end: searching half a million objects takes the garbage collector 0.25 s each time."""
    gc.collect()
    gc.freeze()


@cache
def pair_of(kind: str) -> tuple[Any, Any]:
    """(Hugging Face model, the same weights on engines); made once per process."""
    hugging_face = make_hugging_face(kind)
    return hugging_face, TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)


@pytest.fixture(autouse=True, scope="session")
def _compiled_once() -> Iterator[None]:
    """The decoder's C code is compiled into the default store, and not into each of the stores that tests make."""
    load, folder, patch = cpu_compile._load_library, default_engine_cache_dir(), pytest.MonkeyPatch()
    patch.setattr(cpu_compile, "_load_library", lambda *_: load(folder, None))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests run side by side: one torch thread each."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _transformers_verbosity() -> Iterator[None]:
    """A command that a test runs in this process silences Transformers; the tests after it read its warnings."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(params=list(KINDS))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Every kind in turn."""
    return pair_of(request.param)


@pytest.fixture
def own_pair() -> tuple[Any, Any]:
    """(Hugging Face model, model on engines) of T5 v1.1 with equal weights of their own, which a test may change."""
    hugging_face = make_hugging_face("t5-v1.1")
    return hugging_face, TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)


@pytest.fixture
def v11() -> tuple[Any, Any]:
    """The T5 v1.1 pair."""
    return pair_of("t5-v1.1")


@pytest.fixture
def v10() -> tuple[Any, Any]:
    """The T5 v1.0 pair."""
    return pair_of("t5-v1.0")


@pytest.fixture
def fresh() -> Any:
    """A T5 v1.1 model on engines that no other test touches."""
    return TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1", seed=9), num_threads=1)


@pytest.fixture(scope="session")
def shipped_folder() -> Path:
    """Folder of the model that the repository ships."""
    return SHIPPED


@pytest.fixture(scope="session")
def shipped(shipped_folder: Path) -> tuple[Any, Any, Any]:
    """(tokenizer, Hugging Face model, model on engines) of the shipped checkpoint."""
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(shipped_folder)
    hugging_face = T5ForConditionalGeneration.from_pretrained(shipped_folder).eval()
    return tokenizer, hugging_face, TRTT5ForConditionalGeneration.from_pretrained(shipped_folder, num_threads=1)
