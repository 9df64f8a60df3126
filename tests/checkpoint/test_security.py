"""What a hostile checkpoint may try: its code must not run, its names must not lead elsewhere, reading it must end."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import CheckpointError, TRTT5ForConditionalGeneration
from t5_trt.checkpoint.load import load_config, load_tokenizer
from tests.tiny_models import batch, make_hugging_face

BOMB = """
from pathlib import Path
Path({mark!r}).write_text("run")
"""


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    make_hugging_face("t5-v1.1").save_pretrained(folder)
    return folder


def change_config(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_not_run(checkpoint: Path, tmp_path: Path, legacy: bool) -> None:
    mark = tmp_path / "mark"
    (checkpoint / "model.safetensors").unlink()
    if legacy:
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"shared.weight": Bomb(mark)}))
    else:
        torch.save({"shared.weight": Bomb(mark)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb is a live one


def test_modules_are_not_imported(checkpoint: Path, tmp_path: Path) -> None:
    """auto_map names code in the checkpoint; so does a custom_generate folder."""
    mark = tmp_path / "mark"
    code = BOMB.format(mark=str(mark))
    (checkpoint / "evil.py").write_text(code)
    (checkpoint / "custom_generate").mkdir()
    (checkpoint / "custom_generate" / "generate.py").write_text(code + "\ndef generate(model, **kwargs): return 1\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model"}
    change_config(checkpoint, auto_map=names)
    change_config(checkpoint, "generation_config.json", auto_map=names)
    ours = TRTT5ForConditionalGeneration.from_pretrained(checkpoint, num_threads=1)
    ours.generate(**batch(), max_new_tokens=3)
    assert not mark.exists()


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_nobody_is_asked_whether_to_run_code(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    """Transformers asks on the terminal where it knows no class of its own, and people say yes."""
    mark = tmp_path / "mark"
    (checkpoint / "evil.py").write_text(BOMB.format(mark=str(mark)) + "\nclass Thing: pass\n")
    change_config(checkpoint, model_type="evil", auto_map={"AutoConfig": "evil.Thing"})
    maps = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Thing", None]}}
    change_config(checkpoint, "tokenizer_config.json", **maps)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError):
        load(str(checkpoint))
    assert not mark.exists()


def test_arguments_that_let_code_run_are_not_used(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mark = tmp_path / "mark"
    (checkpoint / "custom_generate").mkdir()
    (checkpoint / "custom_generate" / "generate.py").write_text(BOMB.format(mark=str(mark)) + "\ndef generate(): 0\n")
    with caplog.at_level(logging.WARNING, "t5_trt"):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint, trust_remote_code=True, num_threads=1)
    assert "trust_remote_code=True is not used" in caplog.text
    (checkpoint / "model.safetensors").unlink()
    torch.save({"shared.weight": Bomb(mark)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError), caplog.at_level(logging.WARNING, "t5_trt"):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint, weights_only=False)
    assert "weights_only=False is not used" in caplog.text and not mark.exists()


def test_a_config_chooses_no_kernel(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with a slash is a kernel on the hub, which Transformers would fetch and import."""
    asked: list[Any] = []
    monkeypatch.setattr("transformers.modeling_utils.is_kernel", lambda name: bool(asked.append(name)))
    change_config(checkpoint, attn_implementation="someone/kernel", _attn_implementation="someone/kernel")
    ours = TRTT5ForConditionalGeneration.from_pretrained(checkpoint, num_threads=1)
    ours.generate(**batch(), max_new_tokens=3)
    assert ours.reference.config._attn_implementation == "eager"
    assert asked and "someone/kernel" not in asked


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/../../outside", "..\\outside", ".."])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_beside_it_only(checkpoint: Path, name: str, index: str) -> None:
    os.rename(checkpoint / "model.safetensors", checkpoint.parent / "outside.safetensors")
    (checkpoint / index).write_text(json.dumps({"metadata": {}, "weight_map": {"shared.weight": name}}))
    with pytest.raises(CheckpointError, match="expected names of files beside it"):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_from_a_hub_names_files_beside_it_only(checkpoint: Path, index: str) -> None:
    """A file outside of the hub's cache, which it would find there."""
    cache = checkpoint.parent / "cache"
    repository = cache / "models--someone--t5"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    snapshot = repository / "snapshots" / ("0" * 40)
    checkpoint.rename(snapshot)
    os.rename(snapshot / "model.safetensors", cache.parent / "outside.safetensors")
    shards = dict.fromkeys(make_hugging_face("t5-v1.1").state_dict(), "../../../../outside.safetensors")
    (snapshot / index).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert (snapshot / shards["shared.weight"]).is_file()
    with pytest.raises(CheckpointError, match="expected names of files beside it"):
        TRTT5ForConditionalGeneration.from_pretrained("someone/t5", cache_dir=cache, local_files_only=True)


def test_other_indexes_are_looked_at_too(checkpoint: Path) -> None:
    """That of a variant, and one that the config names."""
    index = json.dumps({"metadata": {}, "weight_map": {"shared.weight": "../outside.safetensors"}})
    for name in ("model.safetensors.index.fp16.json", "other.safetensors.index.json"):
        (checkpoint / name).write_text(index)
    with pytest.raises(CheckpointError, match="expected names of files beside it"):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint, variant="fp16")
    change_config(checkpoint, transformers_weights="other.safetensors.index.json")
    with pytest.raises(CheckpointError, match="expected names of files beside it"):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname.safetensors", "..", 3])
def test_a_config_names_weights_beside_it_only(checkpoint: Path, name: Any) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "outside.safetensors")
    change_config(checkpoint, transformers_weights=name)
    with pytest.raises(CheckpointError, match="expected the name of a file beside it"):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1'])
def test_invalid_weight_index_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="expected JSON with a weight_map"):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_pipes_are_refused(checkpoint: Path, name: str) -> None:
    """Opening one would wait for a writer for ever."""
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(CheckpointError):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint)


def test_devices_are_refused(checkpoint: Path) -> None:
    shutil.copytree(checkpoint, checkpoint.parent / "whole")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("/dev/zero")
    config = load_config(str(checkpoint.parent / "whole"))
    for given in (None, config):
        with pytest.raises(CheckpointError, match="a pipe, a socket or a device"):
            TRTT5ForConditionalGeneration.from_pretrained(checkpoint, config=given)


def test_links_to_files_are_fine(checkpoint: Path) -> None:
    """The hub's cache consists of them."""
    blob = checkpoint.parent / "blob"
    os.rename(checkpoint / "model.safetensors", blob)
    (checkpoint / "model.safetensors").symlink_to(blob)
    assert TRTT5ForConditionalGeneration.from_pretrained(checkpoint, num_threads=1).num_parameters() > 0


def test_temporary_files_are_private(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is written on the way lies in folders of mode 0700, where the umask would open it to everybody."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    seen: dict[str, int] = {}
    write_bytes, write_text = Path.write_bytes, Path.write_text

    def look(path: Path) -> None:
        if place in path.parents:
            seen[path.name] = path.parent.stat().st_mode & 0o777

    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (look(path), write_bytes(path, data))[1])
    monkeypatch.setattr(Path, "write_text", lambda path, *text, **how: (look(path), write_text(path, *text, **how))[1])
    before = os.umask(0)
    try:
        ours = TRTT5ForConditionalGeneration.from_pretrained(checkpoint, num_threads=1, decode="engine")
        ours.generate(**batch(), max_new_tokens=3)
    finally:
        os.umask(before)
    assert seen == {"weights": 0o700} and not list(place.iterdir())
