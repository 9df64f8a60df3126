"""The decoder's C code compiled by the system's C compiler for the processor at hand; the library is kept on disk."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from t5_trt.engine.store import PLAN, EngineStore
from t5_trt.errors import BackendError
from t5_trt.kernels.compile import NOT_KEPT, read_sources, sources_digest, store_key

logger = logging.getLogger("t5_trt")

SOURCE = "cpu/decode_step.c"
COMPILERS = ("cc", "gcc", "clang")
#: no -ffast-math and no contractions: results of a row must not depend on the number of rows
FLAGS = (
    "-O3", "-ffp-contract=off", "-std=gnu11", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC", "-pthread",
)  # fmt: skip
LIBRARIES = ("-lm",)
#: flags for the processor at hand, in the order in which they are tried: compilers differ
TARGETS = (("-march=native",), ("-mcpu=native",), ())
#: what a compiler and a C library must have; compiled in some 40 ms, where the decoder takes seconds
TRIAL = """
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
Floats swapped(Floats a) { return __builtin_shufflevector(a, a, 1, 0, 3, 2); }
Floats converted(Ints a) { return __builtin_convertvector(a, Floats); }
"""
INSTALL = "`apt install gcc libc6-dev`, or `pip install ziglang` and set CC='python -m ziglang cc'"
NEEDED = f"It takes GCC 12 or newer, or Clang, and the headers of the C library: {INSTALL}"
#: seconds after which a compiler is given up
PATIENCE_S = 300
_LINES = 6
_loaded: list[ctypes.CDLL] = []


class _CompilerError(BackendError):
    """A C compiler is missing or refuses the source."""


@dataclass(frozen=True)
class Compiler:
    """A C compiler: its command, whose program is an absolute path, and what it says of its version."""

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{shlex.join(self.command)} ({self.version or 'of unknown version'})"


def find_compiler() -> Compiler:
    """The C compiler that the environment variable CC names, else the first of `COMPILERS` in the search path.

    Raises:
        BackendError: there is none.
    """
    try:
        named = shlex.split(os.environ.get("CC") or "")
    except ValueError as error:
        raise _CompilerError(f"the environment variable CC is {os.environ['CC']!r}: {error}") from error
    for program, *arguments in [named] if named else [[name] for name in COMPILERS]:
        path = shutil.which(program)
        if path is not None:
            command = (os.path.abspath(path), *arguments)
            return Compiler(command, _version(command))
    if named:
        raise _CompilerError(f"the environment variable CC names {named[0]!r}, which is not found. {NEEDED}")
    raise _CompilerError(f"there is no C compiler (looked for {', '.join(COMPILERS)}). {NEEDED}")


def why_not_compiled() -> str | None:
    """Why the decoder's C code cannot be compiled and run here, or None; compiles a few lines, once per process."""
    if os.name != "posix" or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        return f"the C code is for little-endian 64-bit POSIX systems; this is {sys.platform} on {platform.machine()}"
    try:
        compiler = find_compiler()
    except BackendError as error:
        return str(error)
    problem = _try(compiler.command)[1]
    return None if problem is None else f"the C compiler {compiler} does not work: {problem}. {NEEDED}"


def load_library(store: EngineStore) -> ctypes.CDLL:
    """The compiled C code, out of a store or compiled anew; loaded once per process and store.

    If the store cannot be written, or its files cannot be loaded, every process compiles the code, with a warning.

    Raises:
        BackendError: there is no C compiler, or it cannot compile the code, or the system cannot load it.
    """
    library = _load_library(store.root, store.max_bytes)
    _loaded[:] = [library]
    return library


def loaded_library() -> ctypes.CDLL | None:
    """The compiled C code if this process has loaded it; compiles nothing."""
    return _loaded[-1] if _loaded else None


@cache
def _load_library(root: Path, max_bytes: int | None) -> ctypes.CDLL:
    store, compiler = EngineStore(root, max_bytes), find_compiler()
    facts: dict[str, Any] = {
        "kernels": SOURCE,
        "flags": _flags(compiler),
        "sources": sources_digest(SOURCE),
        "compiler": str(compiler),
        "processor": _processor(),
    }
    try:
        return _stored(store, store_key(facts), facts, compiler)
    except _CompilerError:
        raise
    except (BackendError, OSError) as error:
        logger.warning(NOT_KEPT, error)
    with tempfile.TemporaryDirectory(prefix="t5_trt-") as folder:
        library = Path(folder) / "decode_step.so"
        compile_library(compiler, library)
        try:
            return _opened(library)  # which needs the file no longer
        except OSError as error:
            raise BackendError(
                f"the system cannot load what {compiler} made: {error}. Look whether {tempfile.gettempdir()} allows "
                "programs (noexec), or set TMPDIR to another folder."
            ) from error


def compile_library(compiler: Compiler, library: Path) -> None:
    """Compile the decoder's C code into a shared library.

    Raises:
        BackendError: the compiler refuses it.
    """
    with tempfile.TemporaryDirectory(prefix="t5_trt-") as folder:
        for name, text in read_sources(SOURCE).items():
            (Path(folder) / name).write_bytes(text)
        source = Path(folder) / Path(SOURCE).name
        command = [*compiler.command, *_flags(compiler), str(source), "-o", str(library), *LIBRARIES]
        problem = _run(command)
    if problem is not None:
        raise _CompilerError(
            f"the C compiler {compiler} cannot compile {SOURCE}: {problem}. The command was: {shlex.join(command)}. {NEEDED}."
        )


def _stored(store: EngineStore, key: str, facts: dict[str, Any], compiler: Compiler) -> ctypes.CDLL:
    def build(folder: Path) -> None:
        compile_library(compiler, folder / PLAN)

    library = store.file_or_build(key, facts, build)
    try:
        return _opened(library)
    except OSError as error:  # removed meanwhile, or made for another C library
        logger.info("the stored library %s is compiled again: %s", library, error)
        store.remove(key)
    return _opened(store.file_or_build(key, facts, build))


def _opened(path: Path) -> ctypes.CDLL:
    library, address, number = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_int64
    library.t5_open_team.restype, library.t5_open_team.argtypes = address, [ctypes.c_int, ctypes.c_int]
    library.t5_close_team.restype, library.t5_close_team.argtypes = None, [address]
    library.t5_open.restype, library.t5_open.argtypes = address, [address, address]
    library.t5_close.restype, library.t5_close.argtypes = None, [address]
    library.t5_decode.restype, library.t5_decode.argtypes = ctypes.c_int, [address, address]
    library.t5_encode.restype, library.t5_encode.argtypes = ctypes.c_int, [address, address]
    library.t5_large_pages.restype, library.t5_large_pages.argtypes = None, [address, number]
    library.t5_pack.restype, library.t5_pack.argtypes = None, [address, number, number, ctypes.c_int, address]
    library.t5_use_rough_head.restype, library.t5_use_rough_head.argtypes = None, [address, address]
    library.t5_round_head.restype, library.t5_round_head.argtypes = None, [address, number, number, *[address] * 4]
    library.t5_log_softmax.restype, library.t5_log_softmax.argtypes = None, [address, number, number, address]
    library.t5_best_sums.restype = None
    library.t5_best_sums.argtypes = [*[address] * 3, ctypes.c_int, *[number] * 4, address, address]
    return library


def _flags(compiler: Compiler) -> list[str]:
    return [*FLAGS, *_try(compiler.command)[0]]


@cache
def _try(command: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """The flags for this processor that a compiler takes, and its message if it can compile nothing at all."""
    with tempfile.TemporaryDirectory(prefix="t5_trt-") as folder:
        source = Path(folder) / "trial.c"
        source.write_text(TRIAL)
        for target in TARGETS:
            problem = _run([*command, *FLAGS, *target, str(source), "-o", f"{source}.so", *LIBRARIES])
            if problem is None:
                break
    return target, problem


@cache
def _version(command: tuple[str, ...]) -> str:
    """The first line that a compiler prints about itself; empty if it does not."""
    try:
        asked = subprocess.run(
            [*command, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(asked.stdout.decode(errors="replace").splitlines()), "")


def _run(command: Sequence[str]) -> str | None:
    """Run a compiler; the last lines of what it says if it fails, else None."""
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        run = subprocess.run(command, timeout=PATIENCE_S, env={**os.environ, "LC_ALL": "C"}, **options)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error).rstrip(".")
    if run.returncode == 0:
        return None
    lines = run.stdout.decode(errors="replace").strip().splitlines()
    return "\n".join(lines[-_LINES:]).rstrip(".") or f"it ends with status {run.returncode} and says nothing"


def _processor() -> str:
    """The processor's name, and a digest of what it can do."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = (part.strip() for part in line.partition(":"))
            if name in (
                "vendor_id",
                "cpu family",
                "model",
                "model name",
                "flags",
                "Features",
                "CPU implementer",
                "CPU part",
            ):
                facts.setdefault(name, value)
    except OSError:  # no Linux
        facts["model name"] = platform.processor()
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:12]
    return f"{platform.machine()} {facts.get('model name', '')} {digest}"
