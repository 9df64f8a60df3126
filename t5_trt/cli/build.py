"""``t5-trt build``: builds a model's engines before its first request."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from t5_trt.cli.arguments import CacheDir, Decode, EnginePrecision, Flavor, ListCommand, Model, read_lines

_CAPABILITY = re.compile(r"\d{1,2}\.\d")


def is_capability(word: str) -> bool:
    """Whether a word is a compute capability, such as 8.6."""
    return _CAPABILITY.fullmatch(word) is not None


class BuildCommand(ListCommand):
    """Accepts several capabilities after one option, before or after the model."""

    lists = {"--compute-capability": is_capability}


def _capabilities(values: Optional[list[str]]) -> Optional[list[str]]:  # noqa: UP045 - typer reads it at run time
    wrong = next((value for value in values or () if not is_capability(value)), None)
    if wrong is not None:
        raise typer.BadParameter(f"{wrong!r} is no compute capability; expected such as 8.6 8.9 12.0.")
    return values


def build(
    model: Model,
    flavor: Flavor = None,
    compute_capability: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="GPUs to build for without one here, such as 8.6 8.9 12.0 (rtx)", callback=_capabilities),
    ] = None,
    precision: EnginePrecision = "fp16",
    decode: Decode = "auto",
    calibrate: Annotated[
        Optional[Path], typer.Option(help="file of texts, one a line, that set the range of fp16")  # noqa: UP045
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="largest number of rows")] = 1,
    beams: Annotated[int, typer.Option(min=1, help="beams of each row")] = 1,
    source_tokens: Annotated[int, typer.Option(min=1, help="largest number in a source")] = 128,
    target_tokens: Annotated[int, typer.Option(min=1, help="largest number that is generated")] = 128,
    cache_dir: CacheDir = None,
) -> None:
    """Build a model's engines ahead: encoder, one-token step, and decoder with several query positions.

    Those of the decoder are left out where the library's own kernels decode.
    """
    from t5_trt.checkpoint.model_names import check_model_name
    from t5_trt.config import default_engine_cache_dir

    texts = None if calibrate is None else read_lines("--calibrate", calibrate)
    check_model_name(model)

    from t5_trt.prebuild import build_engines

    start = time.monotonic()
    engines = build_engines(
        model,
        flavor=flavor,
        compute_capabilities=compute_capability or (),
        precision=precision,
        decode=decode,
        calibration=texts,
        batch=batch,
        beams=beams,
        source_tokens=source_tokens,
        target_tokens=target_tokens,
        cache_dir=cache_dir,
    )
    for engine in engines:
        typer.echo(f"{engine.label}: {engine.size_bytes / 1e6:.1f} MB")
    where = cache_dir or default_engine_cache_dir()
    typer.echo(
        f"{len(engines)} {'engine' if len(engines) == 1 else 'engines'} in {where}, {time.monotonic() - start:.1f} s"
    )
