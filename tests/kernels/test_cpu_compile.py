"""The decoder's C code is compiled by the system's compiler, once for a store, and says why where it cannot be."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from t5_trt.engine.store import EngineStore
from t5_trt.errors import BackendError
from t5_trt.kernels import cpu_compile
from t5_trt.kernels.compile import read_sources
from t5_trt.kernels.cpu_compile import COMPILERS, find_compiler, load_library, loaded_library, why_not_compiled
from tests.conftest import ROOT

#: that of the package; tests/conftest.py replaces it for all others
LOAD = cpu_compile._load_library
CC = next((path for path in map(shutil.which, COMPILERS) if path), None)
needs_compiler = pytest.mark.skipif(CC is None, reason="there is no C compiler")
#: compiled instead of the decoder where a second would be too long
SMALL = b"""
#include <stdint.h>
int t5_open_team, t5_close_team, t5_open, t5_encode, t5_close, t5_decode, t5_large_pages, t5_log_softmax, t5_best_sums;
void t5_pack(const uint8_t *from, int64_t inputs, int64_t columns, int shifted, uint8_t *to) {
    for (int64_t i = 0; i < inputs; i++) to[i] = from[i];
    to[inputs] = 128;
}
"""
SCRIPT = """
import pathlib, sys
from t5_trt.engine.store import EngineStore
from t5_trt.kernels.cpu_compile import load_library
load_library(EngineStore(pathlib.Path(sys.argv[1]))).t5_open
"""


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Nothing is loaded or known yet; called, it is so again."""

    known = (LOAD, cpu_compile._try, cpu_compile._version)

    def forget() -> None:
        for each in known:
            each.cache_clear()
        cpu_compile._loaded.clear()

    monkeypatch.setattr(cpu_compile, "_load_library", LOAD)
    monkeypatch.setattr(cpu_compile, "read_sources", lambda name: {"decode_step.c": SMALL})
    monkeypatch.delenv("CC", raising=False)
    forget()
    yield forget
    forget()


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make CC a compiler that writes its calls down, and refuses some; returns a function that counts compiles of the decoder."""

    def make(refused: str = "nothing at all") -> Callable[[], int]:
        log, path = tmp_path / "calls", tmp_path / "compiler"
        path.write_text(
            f'#!/bin/sh\necho "$*" >>{log}\n'
            f'case "$*" in *{refused!r}*) echo "unknown option" >&2; exit 1;; esac\nexec {CC} "$@"\n'
        )
        path.chmod(0o700)
        monkeypatch.setenv("CC", str(path))
        return lambda: log.read_text().count("/decode_step.c -o")

    return make


def works(library: ctypes.CDLL) -> bool:
    """Whether it lays out a matrix of 8 bits."""
    packed = (ctypes.c_uint8 * 64)(*[9] * 64)
    library.t5_pack(bytes([5, 6, 7, 8]), 4, 1, 1, packed)
    return list(packed[:5]) == [5, 6, 7, 8, 128]


def only_entry(store: EngineStore) -> Any:
    (entry,) = store.entries()
    return entry


@needs_compiler
def test_compiled_once_for_a_store(
    store: EngineStore, compiler: Any, new_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_compile, "read_sources", read_sources)
    compiles = compiler()
    assert loaded_library() is None
    library = load_library(store)
    assert loaded_library() is library
    assert works(library) and library.t5_open.restype is ctypes.c_void_p and load_library(store) is library
    new_process()
    assert works(load_library(EngineStore(store.root))) and compiles() == 1
    facts = only_entry(store).manifest
    assert facts["kernels"] == "cpu/decode_step.c" and "-O3" in facts["flags"] and "-ffast-math" not in facts["flags"]


@needs_compiler
def test_two_processes_at_once_compile_once(store: EngineStore, compiler: Any) -> None:
    compiles = compiler()
    command = [sys.executable, "-c", SCRIPT, str(store.root)]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0)] * 2
    assert compiles() == 1 and works(load_library(store)) and compiles() == 1


@needs_compiler
@pytest.mark.parametrize("what", ["processor", "compiler"])
def test_another_processor_or_compiler_has_a_library_of_its_own(
    store: EngineStore, compiler: Any, new_process: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    compiles = compiler()
    load_library(store)
    new_process()
    if what == "processor":
        monkeypatch.setattr(cpu_compile, "_processor", lambda: "another one")
    else:
        monkeypatch.setattr(cpu_compile, "_version", lambda command: "another one")
    assert works(load_library(store)) and compiles() == len(store.entries()) == 2


@needs_compiler
@pytest.mark.parametrize("noticed_by", ["store", "system"])
def test_damaged_library_is_compiled_again(
    store: EngineStore, compiler: Any, new_process: Any, caplog: pytest.LogCaptureFixture, noticed_by: str
) -> None:
    """By its digest, or, as one for another C library, when it is loaded."""
    compiles, made = compiler(), EngineStore(store.root.with_name("made"))
    load_library(made)
    made.root.rename(store.root)  # a process loads what has the path of a loaded library only once
    entry = only_entry(store)
    (entry.folder / "engine.plan").unlink()  # it is still mapped
    (entry.folder / "engine.plan").write_bytes(b"not a library")
    (entry.folder / "engine.plan").chmod(0o600)
    if noticed_by == "system":
        facts = entry.manifest | {"sha256": hashlib.sha256(b"not a library").hexdigest()}
        (entry.folder / "manifest.json").write_text(json.dumps(facts))
    assert works(load_library(store)) and compiles() == 2
    assert ("its bytes are not those that were built" in caplog.text) == (noticed_by == "store")
    new_process()
    assert works(load_library(store)) and compiles() == 2


@needs_compiler
def test_store_that_cannot_be_written_causes_a_warning(store: EngineStore, caplog: pytest.LogCaptureFixture) -> None:
    store.root.write_text("a file where the folder would be")
    assert works(load_library(store)) and "not kept for the next process" in caplog.text
    caplog.clear()
    assert works(load_library(store)) and not caplog.text


@needs_compiler
def test_store_whose_files_cannot_be_loaded_causes_a_warning(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where it forbids programs (noexec)."""
    opened = cpu_compile._opened

    def refuse(path: Path) -> ctypes.CDLL:
        if store.root in path.parents:
            raise OSError(f"{path}: failed to map segment")
        return opened(path)

    monkeypatch.setattr(cpu_compile, "_opened", refuse)
    assert works(load_library(store)) and "failed to map segment" in caplog.text
    cpu_compile._load_library.cache_clear()
    monkeypatch.setattr(cpu_compile, "_opened", lambda path: refuse(store.root / "any"))
    with pytest.raises(BackendError, match=r"cannot load what .* made: .*TMPDIR"):
        load_library(store)


@needs_compiler
@pytest.mark.parametrize("refused", ["-march=native", "native"])
def test_flags_for_the_processor_are_those_that_the_compiler_knows(
    store: EngineStore, compiler: Any, refused: str
) -> None:
    compiles = compiler(refused)
    assert why_not_compiled() is None and works(load_library(store)) and compiles() == 1
    flags = only_entry(store).manifest["flags"]
    assert [flag for flag in flags if "native" in flag] == ([] if refused == "native" else ["-mcpu=native"])


@needs_compiler
def test_cc_may_have_arguments(store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in CC='python -m ziglang cc'."""
    script = tmp_path / "with space.py"
    script.write_text(f"import os, sys; os.execv({CC!r}, [{CC!r}, *sys.argv[1:]])")
    monkeypatch.setenv("CC", f"{sys.executable} '{script}'")
    assert find_compiler().command == (sys.executable, str(script)) and why_not_compiled() is None
    assert works(load_library(store)) and str(script) in only_entry(store).manifest["compiler"]


@needs_compiler
def test_error_has_the_compilers_message(store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cpu_compile, "read_sources", lambda name: {"decode_step.c": b"int t5_open(void) { return NAME; }"}
    )
    with pytest.raises(BackendError, match=r"(?s)cannot compile cpu/decode_step\.c: .*NAME.*The command was: .*-O3"):
        load_library(store)
    assert store.entries() == [] and not list(store.root.glob(".building-*"))


def test_compiler_that_does_not_work(store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    words = r"the C compiler \S*false .*: it ends with status 1 and says nothing"
    with pytest.raises(BackendError, match=words):
        load_library(store)
    problem = why_not_compiled()
    assert problem is not None and "does not work: it ends with status 1" in problem and "libc6-dev" in problem


@pytest.mark.parametrize(
    ("cc", "words"),
    [
        (None, r"there is no C compiler \(looked for cc, gcc, clang\)\. .*apt install gcc libc6-dev.*ziglang"),
        ("icc -v", r"CC names 'icc', which is not found\. .*apt install gcc libc6-dev"),
        ("cc 'x", r"CC is \"cc 'x\": No closing quotation"),
    ],
)
def test_compiler_that_is_missing(
    store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cc: str | None, words: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    with pytest.raises(BackendError, match=words) as raised:
        load_library(store)
    assert why_not_compiled() == str(raised.value)


def test_other_systems_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    problem = why_not_compiled()
    assert problem is not None and "little-endian 64-bit POSIX systems; this is" in problem
