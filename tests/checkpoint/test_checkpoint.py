"""`from_pretrained`: every way a checkpoint is stored loads; what is not whole, or not T5, is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    LongT5Config,
    SwitchTransformersConfig,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from t5_trt import CheckpointError, TRTT5ForConditionalGeneration, UnsupportedModelError
from tests.tiny_models import KINDS, batch, make_hugging_face

WEIGHTS = "model.safetensors"


def load(folder: Path, **options: Any) -> Any:
    return TRTT5ForConditionalGeneration.from_pretrained(folder, num_threads=1, **options)


def same_tokens(model: Any, hugging_face: Any) -> bool:
    request = {**batch(), "max_new_tokens": 8}
    return bool(model.generate(**request).tolist() == hugging_face.generate(**request).tolist())


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A T5 v1.1 model and the folder it was saved to."""
    hugging_face = make_hugging_face("t5-v1.1", seed=4)
    hugging_face.save_pretrained(tmp_path / "model")
    return hugging_face, tmp_path / "model"


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_from_a_folder(kind: str, tmp_path: Path) -> None:
    hugging_face = make_hugging_face(kind, seed=2)
    hugging_face.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert isinstance(model, TRTT5ForConditionalGeneration) and isinstance(model, type(hugging_face))
    assert same_tokens(model, hugging_face)


def test_sharded(saved: tuple[Any, Path], tmp_path: Path) -> None:
    saved[0].save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same_tokens(load(tmp_path / "shards"), saved[0])


def test_pytorch_bin(saved: tuple[Any, Path]) -> None:
    hugging_face, folder = saved
    torch.save(hugging_face.state_dict(), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert same_tokens(load(folder), hugging_face)


def test_bin_with_code_is_not_executed(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """A pickle that runs code when loaded must be refused by the weights-only unpickler."""
    _, folder = saved
    mark = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> Any:
            return (open, (str(mark), "w"))

    torch.save({"shared.weight": Attack()}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoint_runs_in_float32(saved: tuple[Any, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    hugging_face, _ = saved
    hugging_face.to(dtype).save_pretrained(tmp_path / "half")
    expected = T5ForConditionalGeneration.from_pretrained(tmp_path / "half", dtype=torch.float32)
    model = load(tmp_path / "half")
    assert model.dtype == torch.float32 and same_tokens(model, expected)


def test_config_of_transformers_4(saved: tuple[Any, Path]) -> None:
    """Old configs say tie_word_embeddings and torch_dtype, and know no scale_decoder_outputs."""
    hugging_face, folder = saved
    config = json.loads((folder / "config.json").read_text())
    for name in ("scale_decoder_outputs", "dtype", "is_gated_act", "dense_act_fn"):
        config.pop(name, None)
    config |= {
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.26.0",
        "n_positions": 512,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    assert model.architecture.output_scale == 1.0 and not model.architecture.tied_head
    assert same_tokens(model, hugging_face)


def test_generation_config_is_used(saved: tuple[Any, Path]) -> None:
    hugging_face, folder = saved
    hugging_face.generation_config.update(num_beams=3, max_new_tokens=7, no_repeat_ngram_size=2)
    hugging_face.save_pretrained(folder)
    model = load(folder)
    assert model.generation_config.num_beams == 3
    assert model.generate(**batch()).tolist() == hugging_face.generate(**batch()).tolist()


def test_vocabulary_comes_from_the_embedding(saved: tuple[Any, Path]) -> None:
    """Some published configs name another vocabulary size than their embedding has rows."""
    hugging_face, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    assert model.architecture.vocab_size == model.config.vocab_size == 211
    assert same_tokens(model, hugging_face)


def test_save_and_reload(saved: tuple[Any, Path], tmp_path: Path) -> None:
    hugging_face, folder = saved
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    assert same_tokens(load(tmp_path / "again"), hugging_face)
    plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert same_tokens(plain, hugging_face)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [
        "T5ForConditionalGeneration"
    ]


def test_subfolder(saved: tuple[Any, Path]) -> None:
    assert same_tokens(load(saved[1].parent, subfolder="model"), saved[0])


def test_hub_layout_offline(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """A hub id resolves through huggingface_hub's own cache, symlinks and all, with no network."""
    repo = tmp_path / "cache" / "models--someone--t5-tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(saved[1].iterdir())):
        blob = repo / "blobs" / f"{number:040d}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    model = load("someone/t5-tiny", cache_dir=tmp_path / "cache", local_files_only=True)  # type: ignore[arg-type]
    assert same_tokens(model, saved[0])


def test_unknown_hub_id_offline(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load 'someone/not-there'"):
        load("someone/not-there", cache_dir=tmp_path, local_files_only=True)  # type: ignore[arg-type]


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"has no config.json \(it holds \['notes.txt'\]\)"):
        load(tmp_path)


def test_folder_without_weights(saved: tuple[Any, Path]) -> None:
    (saved[1] / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        load(saved[1])
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_weights(saved: tuple[Any, Path], keep: int) -> None:
    path = saved[1] / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    before = sorted(saved[1].iterdir())
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        load(saved[1])
    assert sorted(saved[1].iterdir()) == before


def test_damaged_config(saved: tuple[Any, Path]) -> None:
    (saved[1] / "config.json").write_text('{"model_type": "t5", ')
    with pytest.raises(CheckpointError, match="config"):
        load(saved[1])


def test_missing_tensor(saved: tuple[Any, Path]) -> None:
    tensors = load_file(saved[1] / WEIGHTS)
    del tensors["decoder.block.1.layer.2.DenseReluDense.wo.weight"]
    save_file(tensors, saved[1] / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's tensors \(first 'decoder.block.1.layer.2"):
        load(saved[1])


def test_weights_of_other_shapes(saved: tuple[Any, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    config["d_ff"] = 128
    (saved[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"do not fit its config: .* has shape \(.*96.*\), the config says \(.*128"
    ):
        load(saved[1])


@pytest.mark.parametrize(
    ("config", "name"),
    [(SwitchTransformersConfig(), "switch_transformers"), (LongT5Config(), "longt5"), (BertConfig(), "bert")],
)
def test_other_families_are_refused_by_name(config: Any, name: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"model type '{name}'.*t5 .*mt5 .*umt5"):
        load(tmp_path)


def test_t5gemma_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5gemma", "architectures": ["T5GemmaModel"]}))
    with pytest.raises((UnsupportedModelError, CheckpointError), match="t5gemma"):
        load(tmp_path)


def test_encoder_only_is_refused(tmp_path: Path) -> None:
    T5EncoderModel(make_hugging_face("t5-v1.1").config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-only"):
        load(tmp_path)


def test_unknown_activation(tmp_path: Path) -> None:
    hugging_face = make_hugging_face("t5-v1.0", feed_forward_proj="gated-tanh")
    hugging_face.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="gated-tanh"):
        load(tmp_path)


def test_arguments_of_code_for_hugging_face(saved: tuple[Any, Path]) -> None:
    """What people already pass to from_pretrained works, or says what to do."""
    hugging_face, folder = saved
    assert same_tokens(load(folder, device_map="auto", low_cpu_mem_usage=True), hugging_face)
    assert same_tokens(load(folder, device_map="auto", device="cpu"), hugging_face)
    assert load(folder, torch_dtype=torch.float16).dtype is torch.float16
    assert same_tokens(load(folder, dtype="auto", attn_implementation="sdpa"), hugging_face)
    with pytest.raises(ValueError, match=r"quantization_config got .*is not supported"):
        load(folder, quantization_config={"load_in_8bit": True})
    with pytest.raises(ValueError, match="one device"):
        load(folder, device_map={"encoder": 0, "decoder": 1})
