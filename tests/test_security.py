"""What a hostile checkpoint may try: its code must not run, its names must not lead elsewhere, reading it must end."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import CheckpointError, TRTT5ForConditionalGeneration
from tests.tiny_models import batch, make_stock

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
    make_stock("t5-v1.1").save_pretrained(folder)
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


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/../../outside", "..\\outside", ".."])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_beside_it_only(checkpoint: Path, name: str, index: str) -> None:
    os.rename(checkpoint / "model.safetensors", checkpoint.parent / "outside.safetensors")
    (checkpoint / index).write_text(json.dumps({"metadata": {}, "weight_map": {"shared.weight": name}}))
    with pytest.raises(CheckpointError, match="expected names of files beside it"):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1'])
def test_an_index_that_is_none(checkpoint: Path, content: str) -> None:
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
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="a pipe, a socket or a device"):
        TRTT5ForConditionalGeneration.from_pretrained(checkpoint)


def test_links_to_files_are_fine(checkpoint: Path) -> None:
    """The hub's cache consists of them."""
    blob = checkpoint.parent / "blob"
    os.rename(checkpoint / "model.safetensors", blob)
    (checkpoint / "model.safetensors").symlink_to(blob)
    assert TRTT5ForConditionalGeneration.from_pretrained(checkpoint, num_threads=1).num_parameters() > 0
