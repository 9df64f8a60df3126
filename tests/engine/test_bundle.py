"""Engines that travel with a checkpoint: used where they fit and may be trusted, never otherwise."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from t5_trt import BackendError, BuildConfig, InputError, TRTT5ForConditionalGeneration
from t5_trt.engine import bundle as bundles
from t5_trt.engine import provider as providers
from t5_trt.engine.bundle import FOLDER, find_bundle
from t5_trt.engine.profiles import Shapes
from t5_trt.engine.provider import EngineProvider
from t5_trt.engine.store import MANIFEST, PLAN, EngineStore
from tests.tiny_models import make_hugging_face

WANTED = ("encoder", Shapes())


def provider(model: Any, store: Path, bundle: Path | None = None, gpu: str = "one GPU") -> EngineProvider:
    return EngineProvider(
        model.architecture,
        EngineStore(store),
        BuildConfig(),
        precision="fp32",
        flavor="rtx",
        gpu={"name": gpu},
        bundle=bundle,
    )


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    def build(request: Any, arch: Any, folder: Path, *_: Any, **__: Any) -> None:
        (folder / PLAN).write_text(f"{request.label} built")

    monkeypatch.setattr(providers, "build_engine", build)
    return TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), num_threads=1)


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    """A checkpoint's folder with an engine that was used."""
    used = provider(model, tmp_path / "store")
    used.plan(*WANTED)
    model.session = SimpleNamespace(engines=used)
    model.save_pretrained(tmp_path / "model", include_engines=True)
    return tmp_path / "model"


def no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing should be built")

    monkeypatch.setattr(providers, "build_engine", build)


def test_saved_engines_are_used(model: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_building(monkeypatch)
    fresh = provider(model, tmp_path / "empty", find_bundle(str(saved), None))
    assert fresh.plan(*WANTED) == b"encoder B1 S32 fp32 built"
    assert not (tmp_path / "empty").exists() and not fresh.pop_unchecked(*WANTED)
    fresh.write_bundle(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again" / FOLDER).iterdir()] == [
        path.name for path in (saved / FOLDER).iterdir()
    ]
    fresh.write_bundle(saved)  # onto themselves
    assert provider(model, tmp_path / "empty", saved / FOLDER).plan(*WANTED)


def test_checkpoint_with_engines_is_an_ordinary_one(saved: Path) -> None:
    from transformers import T5ForConditionalGeneration

    assert T5ForConditionalGeneration.from_pretrained(saved).config.d_model == 64


def test_engines_of_another_gpu_are_not_used(model: Any, saved: Path, tmp_path: Path) -> None:
    other = provider(model, tmp_path / "empty", saved / FOLDER, gpu="another GPU")
    assert other.plan(*WANTED) and len(other.store.entries()) == 1


@pytest.mark.parametrize("name", ["", PLAN, MANIFEST])
def test_parts_that_others_may_write_to(
    model: Any, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The folder of one engine, or a file in it; also when it is reached by a link, as in the hub's cache."""
    (engine,) = (saved / FOLDER).iterdir()
    part = engine / name if name else engine
    assert part.stat().st_mode & 0o777 == (0o644 if name else 0o755)
    outside = part.rename(tmp_path / "outside")
    part.symlink_to(outside)
    assert provider(model, tmp_path / "none", saved / FOLDER).plan(*WANTED)
    assert not (tmp_path / "none").exists()  # links are fine
    outside.chmod(0o777)
    with caplog.at_level(logging.WARNING, "t5_trt"):
        assert provider(model, tmp_path / "one", saved / FOLDER).plan(*WANTED) == b"encoder B1 S32 fp32 built"
    assert "it may be written by others" in caplog.text and (tmp_path / "one").is_dir()


def test_damaged_or_writable_by_others(
    model: Any, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (engine,) = (saved / FOLDER).iterdir()
    (saved / FOLDER).chmod(0o777)
    with caplog.at_level(logging.WARNING, "t5_trt"):
        assert provider(model, tmp_path / "one", saved / FOLDER).plan(*WANTED)
        assert "others may write to that folder" in caplog.text
        (saved / FOLDER).chmod(0o755)
        (engine / PLAN).write_text("evil")
        assert provider(model, tmp_path / "two", saved / FOLDER).plan(*WANTED) == b"encoder B1 S32 fp32 built"
    assert "its bytes are not those that were built" in caplog.text


@pytest.mark.parametrize("place", ["models--someone--t5/snapshots/0123", "t5"])
def test_downloaded_folders_are_not_trusted(saved: Path, tmp_path: Path, place: str) -> None:
    """A hub's client fills a folder of its cache, or one that it was given, where it leaves notes of its own."""
    folder = tmp_path / place
    shutil.copytree(saved, folder)
    if place == "t5":
        (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    assert find_bundle(str(folder), None) is None and find_bundle(str(folder), True) == folder / FOLDER
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert find_bundle(str(link), None) is None


def test_trust(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder's engines are used unless forbidden; a hub id's are not even fetched unless asked for."""
    assert find_bundle(str(saved), None) == find_bundle(str(saved), True) == saved / FOLDER
    assert find_bundle(str(tmp_path), True) is None
    with caplog.at_level(logging.INFO, "t5_trt"):
        assert find_bundle(str(tmp_path), False) is None and not caplog.text
        assert find_bundle(str(saved), False) is None and "trust_engines=True" in caplog.text
    fetched: list[Any] = []

    def fetch(name: str, **arguments: Any) -> str:
        fetched.append((name, arguments))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_bundle("someone/t5", None, revision="main") is None and not fetched
    assert find_bundle("someone/t5", True, revision="main", token=None) == saved / FOLDER
    assert fetched == [("someone/t5", {"allow_patterns": [f"{FOLDER}/*/*"], "revision": "main"})]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fetch(name: str, **arguments: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with caplog.at_level(logging.WARNING, "t5_trt"):
        assert find_bundle("someone/t5", True) is None
    assert "will be built: no network" in caplog.text


def test_without_engines(tmp_path: Path) -> None:
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), num_threads=1)
    with pytest.raises(InputError, match=r"needs engines; the backend is 'onnxruntime' and nothing was run yet"):
        ours.save_pretrained(tmp_path, include_engines=True)
    assert not list(tmp_path.iterdir())


def test_full_disk(model: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles.shutil, "copytree", copy)
    used = provider(model, tmp_path / "store")
    used.plan(*WANTED)
    with pytest.raises(BackendError, match=r"cannot write engines to .*No space left"):
        used.write_bundle(tmp_path / "full")
    assert not list((tmp_path / "full" / FOLDER).iterdir())


def test_times_of_an_encoder_are_kept_for_other_processes(model: Any, tmp_path: Path) -> None:
    first, second = (provider(model, tmp_path / "store") for _ in range(2))
    assert first.times(*WANTED) is None
    first.plan(*WANTED)
    first.keep_times(*WANTED, {"engine": 2.5, "kernels": 1.5})
    assert second.times(*WANTED) == {"engine": 2.5, "kernels": 1.5}
    assert second.times("encoder", Shapes(B=2)) is None
    assert provider(model, tmp_path / "store", gpu="another GPU").times(*WANTED) is None
    first.keep_times(*WANTED, {"engine": "damaged"})  # type: ignore[dict-item]
    assert second.times(*WANTED) is None
