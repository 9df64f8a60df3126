"""Arguments of ``from_pretrained``: quantization, offloading and several devices are refused by name, what has no effect is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import InputError, TRTT5ForConditionalGeneration
from tests.tiny_models import batch, make_hugging_face


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 v1.1 model, saved."""
    made = tmp_path_factory.mktemp("model")
    make_hugging_face("t5-v1.1").save_pretrained(made)
    return made


def load(folder: Path, **options: Any) -> Any:
    return TRTT5ForConditionalGeneration.from_pretrained(folder, num_threads=1, **options)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("quantization_config", {"load_in_8bit": True}, "precision='int8'"),
        ("load_in_8bit", True, "precision='int8'"),
        ("load_in_4bit", True, "precision='int8'"),
        ("gguf_file", "model.gguf", "save_pretrained"),
        ("max_memory", {0: "10GB", "cpu": "30GB"}, "one device"),
        ("cpu_offload", True, "one device"),
        ("tp_plan", "auto", "one device"),
        ("tp_size", 2, "one device"),
        ("device_mesh", object(), "one device"),
        ("device_map", {"encoder": "cpu", "decoder": "disk"}, "one device"),
        ("device_map", {"encoder": 0, "decoder": 1}, "one device"),
        ("device_map", {}, "one device"),
        ("device_map", "disk", "'cpu' or a GPU"),
        ("device_map", {"": "disk"}, "'cpu' or a GPU"),
        ("device_map", "nonsense", "'cpu' or a GPU"),
        ("device_map", 3.5, "'cpu' or a GPU"),
        ("device", "gpu", "'cpu' or a GPU"),
        ("device", "meta", "'cpu' or a GPU"),
        ("device", [0], "'cpu' or a GPU"),
    ],
)
def test_arguments_that_engines_cannot_serve(name: str, value: Any, advice: str, folder: Path) -> None:
    with pytest.raises(InputError, match=f"{name} got .*{advice}"):
        load(folder, **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_8bit": False}, {"quantization_config": None}, {"offload_folder": "nowhere"}, {"offload_buffers": True},
        {"offload_state_dict": True}, {"low_cpu_mem_usage": False}, {"attn_implementation": "eager"}, {"key_mapping": {}},
        {"device_map": {"": "cpu"}}, {"device_map": torch.device("cpu")}, {"use_safetensors": True}, {"tp_plan": None},
        {"device": "cpu", "device_map": "balanced_low_0"},
    ],
)  # fmt: skip
def test_arguments_without_effect(options: dict[str, Any], folder: Path) -> None:
    assert isinstance(load(folder, **options), TRTT5ForConditionalGeneration)


@pytest.mark.parametrize(
    "options",
    [{"attn_implementation": "flash_attention_2"}, {"attn_implementation": "someone/kernel"}, {"use_kernels": True},
     {"allow_all_kernels": True}],
)  # fmt: skip
def test_ignored_arguments_are_logged(options: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(folder, **options)
    assert f"{next(iter(options))}=" in caplog.text and "is not used" in caplog.text
    assert torch.equal(
        model.generate(**batch(), max_new_tokens=4), make_hugging_face("t5-v1.1").generate(**batch(), max_new_tokens=4)
    )


def test_loading_on_the_meta_device_is_refused_in_hugging_face_s_words(tmp_path: Path) -> None:
    make_hugging_face("t5-v1.1").save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
        TRTT5ForConditionalGeneration.from_pretrained(tmp_path)
