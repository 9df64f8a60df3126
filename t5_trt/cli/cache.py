"""``t5-trt cache``: the engines on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from t5_trt.cli.arguments import CacheDir, Json, console, number, print_json
from t5_trt.config import default_engine_cache_dir
from t5_trt.errors import BackendError, InputError

cache_app = typer.Typer(no_args_is_help=True, help="Engines on disk.", rich_markup_mode=None)


@cache_app.command("path")
def cache_path(cache_dir: CacheDir = None) -> None:
    """Print the folder."""
    typer.echo(str(cache_dir or default_engine_cache_dir()))


@cache_app.command("list")
def cache_list(json: Json = False, cache_dir: CacheDir = None) -> None:
    """List the engines, most recently used first."""
    store = _store(cache_dir)
    entries = store.entries()
    if json:
        engines = [
            {"key": entry.key, "size_bytes": entry.size_bytes, "used_at": entry.used_at, "manifest": entry.manifest}
            for entry in entries
        ]
        print_json({"folder": str(store.root), "engines": engines})
        return
    table = Table("key", "graph", "shapes", "precision", "made for", "MB", "built", "build s")
    for entry in entries:
        facts = entry.manifest
        shapes = " ".join(f"{axis}{size}" for axis, size in facts.get("shapes", {}).items() if isinstance(size, int))
        version = f"{facts.get('flavor')} {facts.get('tensorrt', '')}".strip()
        size = f"{entry.size_bytes / 1e6:.1f}"
        row = (
            facts.get("graph"),
            shapes,
            facts.get("precision"),
            version,
            size,
            facts.get("built_at"),
            facts.get("build_s"),
        )
        table.add_row(entry.key[:12], *(str(cell) for cell in row))
    console().print(table)
    typer.echo(f"{len(entries)} engines, {sum(entry.size_bytes for entry in entries) / 1e6:.1f} MB")


@cache_app.command("show", epilog="Example: t5-trt cache show 3f2a")
def cache_show(
    key: Annotated[str, typer.Argument(help="the key or its beginning")], cache_dir: CacheDir = None
) -> None:
    """Print an engine's manifest."""
    found = [entry for entry in _store(cache_dir).entries() if entry.key.startswith(key)]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} engines have a key that begins with {key!r}; expected one. See `t5-trt cache list`."
        )
    print_json(found[0].manifest)


@cache_app.command("check", epilog="Example: t5-trt cache check --repair")
def cache_check(
    repair: Annotated[bool, typer.Option("--repair", help="remove what is damaged or left over")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Check every engine's bytes and look for leftovers; the status is 1 if anything is wrong afterwards."""
    from t5_trt.engine.store_check import check_store

    store = _store(cache_dir)
    try:
        found = check_store(store, repair=repair)
    except OSError as error:
        raise BackendError(f"cannot check {store.root}: {error}. Look at its owner and its permissions.") from error
    for problem in found:
        typer.echo(f"{'mended' if problem.mended else 'wrong'}: {problem.path}: {problem.what}")
    left = sum(not problem.mended for problem in found)
    typer.echo(f"{len(store.entries())} engines; {len(found) - left} problems mended, {left} left")
    if left:
        raise typer.Exit(1)


@cache_app.command("prune", epilog="Example: t5-trt cache prune --max-gb 10")
def cache_prune(
    max_gb: Annotated[float, number("size to keep, in 10**9 bytes", least=0)], cache_dir: CacheDir = None
) -> None:
    """Delete the engines used least recently until the rest fits."""
    typer.echo(f"{len(_store(cache_dir).prune(int(max_gb * 1e9)))} engines deleted")


@cache_app.command("clear")
def cache_clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False, cache_dir: CacheDir = None
) -> None:
    """Delete all engines, after asking."""
    store = _store(cache_dir)
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("nothing is deleted without a terminal to ask on. Add --yes to delete all engines.")
        typer.confirm(f"Delete the {len(store.entries())} engines in {store.root}?", abort=True)
    typer.echo(f"{store.clear()} engines deleted")


def _store(cache_dir: Path | None) -> Any:
    from t5_trt.engine.store import EngineStore

    root = cache_dir or default_engine_cache_dir()
    if root.exists() and not root.is_dir():
        raise InputError(f"the engine cache got {str(root)!r}, which is no folder. Name a folder with --cache-dir.")
    return EngineStore(root)
