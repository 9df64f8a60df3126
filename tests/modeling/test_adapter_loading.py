"""Adapters that are loaded, switched and saved by Transformers' own methods, and folders given to ``from_pretrained``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

from t5_trt import TRTT5ForConditionalGeneration, prebuild
from t5_trt.errors import CheckpointError, InputError
from tests.adapters import QUIET, compare, lora, randomize, save_adapters
from tests.hub_folders import put_into_cache
from tests.tiny_models import make_hugging_face

pytestmark = QUIET
CONFIGS = {
    "a": lora(),
    "b": lora(target_modules=["q", "wo"]),
    "c": IA3Config(target_modules=["k", "wo"], feedforward_modules=["wo"], task_type="SEQ_2_SEQ_LM"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 v1.0 in "base", and its adapters."""
    path = tmp_path_factory.mktemp("adapters")
    save_adapters(path, "t5-v1.0", CONFIGS)
    return path


@pytest.fixture(autouse=True)
def _any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.24 takes peft 0.22 and newer, which is not there yet; what it calls is in older ones, too."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.19.1")


def both(folder: Path) -> tuple[Any, Any]:
    return tuple(kind.from_pretrained(folder) for kind in (T5ForConditionalGeneration, TRTT5ForConditionalGeneration))  # type: ignore[return-value]


def test_adapter_folder_is_loaded_into_its_base_model(folder: Path) -> None:
    for name in CONFIGS:
        theirs, ours = both(folder / name)
        compare(theirs, ours)
        assert ours.active_adapters() == ["default"] and not ours.training
        assert not any(parameter.requires_grad for name, parameter in ours.named_parameters() if "lora" in name)
    named = TRTT5ForConditionalGeneration.from_pretrained(folder / "a", adapter_name="mine", num_threads=1)
    assert named.active_adapters() == ["mine"]
    inside = TRTT5ForConditionalGeneration.from_pretrained(folder, subfolder="b", num_threads=1)
    compare(T5ForConditionalGeneration.from_pretrained(folder / "b"), inside)
    model, info = TRTT5ForConditionalGeneration.from_pretrained(folder / "a", output_loading_info=True)
    assert model.active_adapters() == ["default"] and not info["missing_keys"]


def test_adapter_and_base_model_are_found_by_their_names_on_the_hub(folder: Path, tmp_path: Path) -> None:
    def write(name: str) -> Callable[[Path], None]:
        def into(snapshot: Path) -> None:
            shutil.copytree(folder / name, snapshot, dirs_exist_ok=True)
            path = snapshot / "adapter_config.json"
            if path.exists():
                stored = json.loads(path.read_text())
                path.write_text(json.dumps({**stored, "base_model_name_or_path": "somebody/base"}))

        return into

    for name in ("base", "a"):
        put_into_cache(tmp_path, f"somebody/{name}", write(name))
    ours = TRTT5ForConditionalGeneration.from_pretrained("somebody/a", cache_dir=str(tmp_path), num_threads=1)
    compare(T5ForConditionalGeneration.from_pretrained(folder / "a"), ours)


def test_a_model_with_its_adapter_beside_it_is_loaded_with_both(folder: Path, tmp_path: Path) -> None:
    for name in ("base", "b"):
        for file in (folder / name).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    compare(*both(tmp_path))


def test_transformers_methods_switch_and_delete(folder: Path) -> None:
    models = both(folder / "a")
    compare(*models)
    for step in (
        lambda model: model.load_adapter(folder / "b", adapter_name="other"),
        lambda model: model.set_adapter("default"),
        lambda model: model.set_adapter(["default", "other"]),
        lambda model: model.disable_adapters(),
        lambda model: model.enable_adapters(),
        lambda model: model.load_adapter(folder / "c", adapter_name="third"),  # (IA)^3 in the same layers as LoRA
        lambda model: model.set_adapter("other"),
        lambda model: model.delete_adapter("default"),
        lambda model: model.delete_adapter(["other", "third"]),
    ):
        for model in models:
            step(model)
        compare(*models)


def test_added_adapters_are_saved_as_the_hugging_face_class_saves_them(tmp_path: Path) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    hugging_face.config.tie_word_embeddings = False
    hugging_face.save_pretrained(tmp_path / "base")
    models = both(tmp_path / "base")
    for name, model in zip(("theirs", "ours"), models, strict=True):
        torch.manual_seed(2)
        model.add_adapter(lora())
        randomize(model, 1)
        model.eval().save_pretrained(tmp_path / name)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    files = [{file.name for file in (tmp_path / name).iterdir()} for name in ("theirs", "ours")]
    assert files[0] == files[1]
    compare(models[0], TRTT5ForConditionalGeneration.from_pretrained(tmp_path / "ours", num_threads=1))


def test_injected_layers_are_saved_under_the_names_of_the_hugging_face_class(folder: Path, tmp_path: Path) -> None:
    for name, model in zip(("theirs", "ours"), both(folder / "base"), strict=True):
        get_peft_model(model, lora(init_lora_weights=True))
        model.save_pretrained(tmp_path / name)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]


def test_peft_model_loads_saves_and_loads_again(folder: Path, tmp_path: Path) -> None:
    wrapped = []
    for model in both(folder / "base"):
        made = PeftModel.from_pretrained(model, folder / "a")
        made.load_adapter(folder / "b", adapter_name="other")
        wrapped.append(made.eval())
    theirs, mine = wrapped
    compare(theirs, mine)
    theirs.set_adapter("other"), mine.set_adapter("other")
    compare(theirs, mine)
    mine.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "other" / "adapter_model.safetensors")
    written = load_file(folder / "b" / "adapter_model.safetensors")
    assert stored.keys() == written.keys() and all(torch.equal(stored[key], written[key]) for key in stored)
    compare(theirs, PeftModel.from_pretrained(both(folder / "base")[1], tmp_path / "other").eval())


def test_calibrated_and_typed_loading_reaches_the_base_model(folder: Path) -> None:
    model = TRTT5ForConditionalGeneration.from_pretrained(folder / "a", dtype=torch.bfloat16, num_threads=1)
    assert model.dtype == torch.bfloat16
    theirs = T5ForConditionalGeneration.from_pretrained(folder / "a")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        wanted, found = (each(ids, decoder_input_ids=ids).logits for each in (theirs, model))
    assert torch.allclose(wanted, found.float(), atol=0.3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path=None"),
        ("{", "adapter_config.json of .* cannot be used"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"peft_type": "PREFIX_TUNING"}, "cannot load the adapter"),
        ("no weights", "cannot load the adapter"),
    ],
    ids=["no base", "damaged", "missing base", "prompt", "no weights"],
)
def test_adapters_that_cannot_be_loaded_are_named(folder: Path, tmp_path: Path, change: Any, words: str) -> None:
    stored = json.loads((folder / "a/adapter_config.json").read_text())
    if change == "no weights":
        change = {}
    else:
        weights = (folder / "a/adapter_model.safetensors").read_bytes()
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    if isinstance(change, dict) and "peft_type" in change:
        made = get_peft_model(
            both(folder / "base")[0], PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)
        )
        made.save_pretrained(tmp_path)
    else:
        text = json.dumps({**stored, **change}) if isinstance(change, dict) else change
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        TRTT5ForConditionalGeneration.from_pretrained(tmp_path)


def test_an_adapter_without_peft_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t5_trt.checkpoint.adapter_files.is_peft_available", lambda: False)
    with pytest.raises(InputError, match=r"pip install t5-trt\[peft\]"):
        TRTT5ForConditionalGeneration.from_pretrained(folder / "a")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_engines_are_built_ahead_for_an_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """8-bit engines hold weights: they are those of the base model with the adapter in them."""
    given: dict[str, Any] = {}
    provider = SimpleNamespace(
        plans=lambda wanted: [b"plan"] * len(wanted), request=lambda graph, shapes: SimpleNamespace(label=graph)
    )
    monkeypatch.setattr(prebuild, "EngineProvider", lambda *args, **options: given.update(options) or provider)
    monkeypatch.setattr(prebuild, "load_tensorrt", lambda flavor: SimpleNamespace(flavor="rtx"))
    options: dict[str, Any] = {"precision": precision, "compute_capabilities": ("8.6",), "decode": "engine"}
    digests = []
    for name in ("base", "a"):
        assert prebuild.build_engines(str(folder / name), **options)
        digests.append(given.get("weights"))
    assert (digests[0] != digests[1]) == (precision == "int8")
    if precision == "int8":
        assert given["quantized"]()
