"""``t5-trt verify``: compares a model's tokens and logits with Hugging Face's class."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.table import Table

from t5_trt.cli.arguments import (
    Backend,
    CacheDir,
    Decode,
    Json,
    Model,
    Precision,
    console,
    number,
    print_json,
    read_lines,
)

if TYPE_CHECKING:
    from t5_trt.tools.verify import BlockError, Comparison
    from t5_trt.tools.verify_plan import Limits

_AtLeast = Annotated[
    Optional[float],  # noqa: UP045 - typer reads it at run time
    number(
        "share of equal sequences, 0 to 1, below which the status is 1; default: 1 in fp32, less in others",
        least=0,
        most=1,
    ),
]
_MaxRelativeError = Annotated[
    Optional[float],  # noqa: UP045
    number("of the logits, above which the status is 1; default: 0.001 in fp32, more in others", least=0),
]


def verify(
    model: Model,
    texts: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time
        typer.Option(help="file of texts, one a line; default: sentences in a language that the tokenizer is made for"),
    ] = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
    decode: Decode = "auto",
    num_beams: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="only this search; default: greedy, beams, and sampling if the checkpoint samples"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    at_least: _AtLeast = None,
    layers: Annotated[bool, typer.Option("--layers", help="also show the error after every block")] = False,
    activations: Annotated[
        bool, typer.Option("--activations", help="also show where half precision comes near its limit")
    ] = False,
    max_relative_error: _MaxRelativeError = None,
    json: Json = False,
    cache_dir: CacheDir = None,
) -> None:
    """Compare a model with Hugging Face's class: tokens, logits, and with --layers the block where they part.

    The status is 1 where a search gives other tokens, or other logits, than the limits of the precision allow.
    """
    from t5_trt.checkpoint.model_names import check_model_name

    lines = None if texts is None else read_lines("--texts", texts)
    check_model_name(model)

    from t5_trt.modeling import TRTT5ForConditionalGeneration
    from t5_trt.tools.verify import import_polygraphy

    if layers:
        import_polygraphy()  # check before the work
    loaded = TRTT5ForConditionalGeneration.from_pretrained(
        model, backend=backend, precision=precision, decode=decode, engine_cache_dir=cache_dir
    )
    batches, sources = _batches(loaded, model, texts, lines, batch_size)
    found = _searches(loaded, batches, num_beams, max_new_tokens, activations=activations)
    facts = {
        **_facts(model, loaded, sources),
        **_judged(found, _limits(loaded.session.precision, at_least, max_relative_error)),
        "layers": [asdict(block) for block in _block_errors(loaded, batches[0])] if layers else [],
    }
    if json:
        print_json(facts)
    else:
        _print_report(facts, layers=layers, activations=activations)
    if not facts["passed"]:
        raise typer.Exit(1)


def _facts(model: str, loaded: Any, sources: str) -> dict[str, str]:
    return {
        "model": model,
        "backend": loaded.session.backend,
        "precision": loaded.session.precision,
        "reference_dtype": str(loaded.reference.dtype).removeprefix("torch."),
        "sources": sources,
    }


def _batches(
    loaded: Any, model: str, texts: Path | None, lines: list[str] | None, batch_size: int
) -> tuple[list[dict[str, Any]], str]:
    """(batches of the lines of `texts`, else of sentences for the tokenizer; where they came from)."""
    from t5_trt.checkpoint.load import load_tokenizer
    from t5_trt.checkpoint.tokenizing import text_batches
    from t5_trt.tools.verify_plan import default_batches

    if lines is None:
        return default_batches(loaded, model, batch_size)
    padding = loaded.config.pad_token_id
    return list(text_batches(load_tokenizer(model), lines, batch_size, pad_token_id=padding)), str(texts)


def _searches(
    loaded: Any, batches: list[dict[str, Any]], num_beams: int | None, max_new_tokens: int, *, activations: bool
) -> dict[str, Comparison]:
    """Name of a search -> its comparison; the first one also includes activations if requested."""
    from t5_trt.tools.verify import compare
    from t5_trt.tools.verify_plan import searches

    planned = searches(loaded.generation_config, loaded.session.precision, num_beams, max_new_tokens)
    found: dict[str, Comparison] = {}
    for name, settings in planned.items():
        found[name] = compare(loaded, loaded.reference, batches, activations=activations and not found, **settings)
    return found


def _limits(precision: str, at_least: float | None, max_relative_error: float | None) -> Limits:
    """The limits from the command line, else those of the precision."""
    from t5_trt.tools.verify_plan import LIMITS

    given = {"at_least": at_least, "max_relative_error": max_relative_error}
    return replace(LIMITS[precision], **{name: value for name, value in given.items() if value is not None})


def _judged(found: dict[str, Comparison], limits: Limits) -> dict[str, Any]:
    """The facts of the report about the comparisons."""
    searches = {name: {**asdict(each), "share": each.share} for name, each in found.items()}
    problems = [f"{name}: {problem}" for name, each in found.items() for problem in limits.exceeded(each)]
    return {
        "limits": asdict(limits),
        "activations": [row for each in searches.values() for row in each.pop("activations")],
        "searches": searches,
        "problems": problems,
        "passed": not problems,
    }


def _block_errors(loaded: Any, batch: dict[str, Any]) -> list[BlockError]:
    import torch

    from t5_trt.tools.verify import block_errors

    start = loaded.generation_config.decoder_start_token_id
    start = loaded.config.decoder_start_token_id if start is None else start
    tokens = [start, *(token % loaded.config.vocab_size for token in range(4, 10))]
    return block_errors(loaded, batch, torch.tensor([tokens] * len(batch["input_ids"])))


def _print_report(facts: dict[str, Any], *, layers: bool, activations: bool) -> None:
    against = f"{facts['backend']} {facts['precision']} against Hugging Face's class in {facts['reference_dtype']}"
    typer.echo(f"{against}, on {facts['sources']}")
    for name, found in facts["searches"].items():
        typer.echo(f"{name}: equal sequences: {found['equal']} of {found['sequences']}")
        if found["first_difference"] is not None:
            typer.echo("  first difference: sequence {}, token {}".format(*found["first_difference"]))
        typer.echo(
            f"  logits: largest error {found['max_logit_error']:.2e}, mean {found['mean_logit_error']:.2e}, relative "
            f"{found['relative_logit_error']:.2e}; KL divergence {found['kl_divergence']:.2e} nats a token"
        )
    if activations:
        table = Table("input of", "largest", "of float16's limit")
        for row in facts["activations"]:
            table.add_row(row["name"], f"{row['largest']:.4g}", f"{row['half_share']:.4%}")
        console().print(table)
    if layers:
        table = Table("after", "largest error", "mean error", "relative error")
        for row in facts["layers"]:
            table.add_row(row["name"], *(f"{row[f'{kind}_error']:.2e}" for kind in ("max", "mean", "relative")))
        console().print(table)
    for problem in facts["problems"]:
        typer.echo(f"NOT within the limits: {problem}")
    if not facts["problems"]:
        limits = facts["limits"]
        typer.echo(
            f"within the limits: at least {limits['at_least']:g} of the sequences equal, relative error of the logits at most "
            f"{limits['max_relative_error']:g}"
        )
