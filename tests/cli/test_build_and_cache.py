"""`t5-trt build`, and `t5-trt cache` on what it stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t5_trt.engine.store import EngineStore
from tests.command_line import MODEL, Run, one_line


def test_build_then_look_at_the_cache(run: Run, tmp_path: Path) -> None:
    """The command of the documentation: engines for three kinds of GPU on a machine that has none."""
    pytest.importorskip("tensorrt_rtx")
    store, texts = str(tmp_path / "store"), tmp_path / "texts.txt"
    texts.write_text("がっこう\nコーヒー\n", encoding="utf-8")
    command = ("build", MODEL, "--flavor", "rtx", "--compute-capability", "8.6", "8.9", "12.0", "--source-tokens", "32")
    status, out, err = run(*command, "--batch", "2", "--calibrate", str(texts), "--cache-dir", store)
    assert status == 0 and "1 engine in" in out and "encoder B2 S32 fp16" in out, err
    status, out, err = run(
        *command, "--batch", "2", "--calibrate", str(texts), "--cache-dir", store, "--decode", "engine"
    )
    assert status == 0 and "3 engines in" in out and "decoder_step B2 S32 T128" in out, err

    listed = run("cache", "list", "--cache-dir", store)[1]
    assert "3 engines" in listed and "decoder_step" in listed and "rtx" in listed
    facts = json.loads(run("cache", "list", "--json", "--cache-dir", store)[1])
    key = facts["engines"][0]["key"]
    assert facts["folder"] == store and len(facts["engines"]) == 3 and facts["engines"][0]["size_bytes"] > 0
    manifest = json.loads(run("cache", "show", key[:10], "--cache-dir", store)[1])
    assert manifest["key"] == key and manifest["gpu"] == {"compute_capabilities": ["8.6", "8.9", "12.0"]}
    assert run("cache", "path", "--cache-dir", store)[1].strip() == store
    assert run("cache", "prune", "--max-gb", "0", "--cache-dir", store)[1] == "3 engines deleted\n"


def test_build_for_what_is_not_there(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    rtx = ("build", MODEL, "--flavor", "rtx", "--cache-dir", str(tmp_path))
    assert "there is no GPU here to build for" in one_line(run(*rtx)[2])
    status, _, err = run(*rtx, "--compute-capability", "9.0")
    assert status == 1 and "builds for 7.5" in err.splitlines()[-1]


@pytest.fixture
def stored(tmp_path: Path) -> EngineStore:
    store = EngineStore(tmp_path / "store")
    store.get_or_build(
        "0" * 32, {"graph": "encoder"}, lambda folder: (folder / "engine.plan").write_bytes(b"plan") and None
    )
    return store


def test_clear_asks_first(run: Run, stored: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clear = ("cache", "clear", "--cache-dir", str(stored.root))
    status, out, err = run(*clear)
    assert status == 1 and out == "" and "--yes" in one_line(err) and len(stored.entries()) == 1
    assert run(*clear, stdin=b"n\n", terminal=True)[0] == 1 and len(stored.entries()) == 1
    status, out, _ = run(*clear, stdin=b"y\n", terminal=True)
    assert status == 0 and "1 engines deleted" in out and stored.entries() == []
    assert run(*clear, "--yes")[1] == "0 engines deleted\n"


def test_a_size_below_nothing_deletes_nothing(run: Run, stored: EngineStore) -> None:
    assert run("cache", "prune", "--max-gb", "-1", "--cache-dir", str(stored.root))[0] == 2 and stored.entries()
    assert run("cache", "prune", "--max-gb", "1", "--cache-dir", str(stored.root))[1] == "0 engines deleted\n"


def test_a_store_that_is_a_file_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for command in (("list",), ("clear", "--yes"), ("prune", "--max-gb", "1"), ("check",)):
        status, _, err = run("cache", *command, "--cache-dir", str(tmp_path / "file"))
        assert status == 1 and "is no folder" in one_line(err)
    status, _, err = run("cache", "show", "nothing", "--cache-dir", str(tmp_path / "none"))
    assert status == 1 and "0 engines have a key that begins with 'nothing'" in one_line(err)
