"""The command ``t5-trt``: what is installed, engines built ahead, text through a model, the store of engines.

Commands import what they need when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from t5_trt import cli_bench
from t5_trt.config import BuildConfig, default_engine_cache_dir
from t5_trt.engine.tensorrt_api import FLAVORS, load_tensorrt
from t5_trt.errors import BackendError, InputError, T5TRTError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    help=__doc__,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(no_args_is_help=True, help="Engines on disk.")
app.add_typer(cache_app, name="cache")
Model = Annotated[str, typer.Argument(help="hub id or folder of a checkpoint")]
CacheDir = Annotated[Optional[Path], typer.Option("--cache-dir", help="folder of engines; default T5_TRT_CACHE")]  # noqa: UP045 - typer reads it at run time


def _show_version(wanted: bool) -> None:
    if wanted:
        import t5_trt

        typer.echo(f"t5-trt {t5_trt.__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What goes before a command."""


@app.command(epilog="Examples: t5-trt info")
def info() -> None:
    """Say what is there, what "auto" chooses, and why."""
    import onnxruntime
    import torch
    import transformers

    import t5_trt
    from t5_trt.config import RuntimeConfig, backend_from_environment
    from t5_trt.runtime.open import choose, why_not_tensorrt

    placement = choose(RuntimeConfig(backend=backend_from_environment(None)))
    if placement.idle_gpu is not None:
        typer.echo(f"{placement.idle_gpu}\n")
    table = Table(show_header=False)
    table.add_row("t5_trt", t5_trt.__version__)
    table.add_row("Python", sys.version.split()[0])
    for name, module in (("PyTorch", torch), ("Transformers", transformers), ("ONNX Runtime", onnxruntime)):
        table.add_row(name, str(module.__version__))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        table.add_row("GPU", f"{properties.name}, compute capability {properties.major}.{properties.minor}")
        table.add_row("CUDA of PyTorch", str(torch.version.cuda))
    else:
        table.add_row("GPU", "none that PyTorch can use")
    for flavor in FLAVORS:
        try:
            table.add_row(f"TensorRT flavour {flavor!r}", load_tensorrt(flavor).version)
        except BackendError as error:
            table.add_row(f"TensorRT flavour {flavor!r}", str(error))
    table.add_row("can TensorRT run here?", why_not_tensorrt() or "yes")
    chosen = f"{placement.backend} in {placement.precision} on {placement.device}: {placement.reason}"
    table.add_row("a model would run on", chosen)
    table.add_row("engine cache", str(default_engine_cache_dir()))
    _console().print(table)


@app.command(
    epilog="Examples: t5-trt build MODEL --batch 8 --beams 4;  t5-trt build MODEL --flavor rtx --compute-capability 8.6 8.9"
)
def build(
    model: Model,
    flavor: Annotated[Optional[str], typer.Option(help='"tensorrt" or "rtx"')] = None,  # noqa: UP045
    compute_capability: Annotated[
        Optional[list[str]], typer.Option(help="GPUs to build for without one here, such as 8.6 8.9 12.0 (rtx)")  # noqa: UP045
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, tf32, fp16, bf16 or int8")] = "fp16",
    calibrate: Annotated[
        Path | None, typer.Option(help="file of texts, one a line, that set the range of fp16")
    ] = None,
    batch: int = 1,
    beams: int = 1,
    source_tokens: int = 128,
    target_tokens: int = 128,
    cache_dir: CacheDir = None,
) -> None:
    """Build a model's engines ahead: encoder, decoder step, and decoder with several query positions."""
    from t5_trt.engine.profiles import Shapes, bucket
    from t5_trt.engine.provider import EngineProvider
    from t5_trt.engine.store import EngineStore
    from t5_trt.modeling import TRTT5ForConditionalGeneration
    from t5_trt.runtime.open import eight_bits
    from t5_trt.signature import ENCODER, QUERIES, STEP

    api = load_tensorrt(flavor)
    capabilities = tuple(compute_capability or ())
    texts = _lines(calibrate) if calibrate else None
    loaded = TRTT5ForConditionalGeneration.from_pretrained(model, backend="onnxruntime", calibration=texts)
    store = EngineStore(cache_dir or default_engine_cache_dir())
    folding = loaded.folding(precision)
    provider = EngineProvider(
        folding.architecture(loaded.architecture),
        store,
        BuildConfig(),
        precision=precision,
        flavor=api.flavor,
        gpu=_gpu(api.flavor, capabilities),
        compute_capabilities=capabilities,
        **eight_bits(loaded.architecture, loaded.state_dict(), folding, precision),
    )
    shapes = Shapes(
        B=bucket("B", batch), N=beams, S=bucket("S", source_tokens), T=bucket("T", target_tokens), Q=bucket("Q", 1)
    )
    wanted = [(graph, shapes) for graph in (ENCODER, STEP, QUERIES)]
    start = time.monotonic()
    plans = provider.plans(wanted)
    for (graph, _), plan in zip(wanted, plans, strict=True):
        typer.echo(f"{provider.request(graph, shapes).label}: {len(plan) / 1e6:.1f} MB")
    typer.echo(f"{len(plans)} engines in {store.root}, {time.monotonic() - start:.1f} s")


@app.command(epilog='Examples: t5-trt generate MODEL "text" --num-beams 4;  t5-trt generate MODEL < lines.txt')
def generate(
    model: Model,
    texts: Annotated[Optional[list[str]], typer.Argument(help="texts; none reads lines from standard input")] = None,  # noqa: UP045
    backend: str = "auto",
    num_beams: Annotated[int | None, typer.Option(min=1, help="default: the checkpoint's")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="default: the checkpoint's limit, or 128")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """Print what a model generates, a line for each text."""
    from t5_trt.checkpoint import load_tokenizer
    from t5_trt.modeling import TRTT5ForConditionalGeneration

    lines = texts or [line.rstrip("\n") for line in sys.stdin]
    tokenizer = load_tokenizer(model)
    loaded = TRTT5ForConditionalGeneration.from_pretrained(model, backend=backend)
    own = loaded.generation_config
    if max_new_tokens is None and own.max_new_tokens is None and own.max_length is None:
        max_new_tokens = 128
    options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    given = {name: value for name, value in options.items() if value is not None}
    for start in range(0, len(lines), batch_size):
        inputs = tokenizer(lines[start : start + batch_size], return_tensors="pt", padding=True).to(loaded.device)
        tokens = loaded.generate(**inputs, **given, return_dict_in_generate=False)
        for line in tokenizer.batch_decode(tokens, skip_special_tokens=True):
            typer.echo(line)


@app.command(epilog="Examples: t5-trt verify MODEL --texts lines.txt --precision int8 --at-least 0.98")
def verify(
    model: Model,
    texts: Annotated[Optional[Path], typer.Option(help="file of texts, one a line; default: random tokens")] = None,  # noqa: UP045
    backend: str = "auto",
    precision: str = "auto",
    num_beams: int = 1,
    max_new_tokens: int = 32,
    batch_size: Annotated[int, typer.Option(min=1)] = 3,
    at_least: Annotated[float, typer.Option(help="share of equal sequences below which the status is 1")] = 1.0,
    layers: Annotated[bool, typer.Option("--layers", help="also show the error after every block")] = False,
    activations: Annotated[
        bool, typer.Option("--activations", help="also show where half precision comes near its limit")
    ] = False,
    max_relative_error: Annotated[float, typer.Option(help="of the logits, above which the status is 1")] = float(
        "inf"
    ),
    cache_dir: CacheDir = None,
) -> None:
    """Compare a model with the stock class: tokens, logits, and with --layers the block where they part."""
    import torch

    from t5_trt.modeling import TRTT5ForConditionalGeneration
    from t5_trt.verification import block_errors, compare

    loaded = TRTT5ForConditionalGeneration.from_pretrained(
        model, backend=backend, precision=precision, engine_cache_dir=cache_dir
    )
    batches = _batches(model, texts, batch_size, loaded.config.vocab_size)
    options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    found = compare(loaded, loaded.reference, batches, activations=activations, **options)
    typer.echo(f"{loaded.session.backend} {loaded.session.precision} against Transformers {loaded.reference.dtype}")
    typer.echo(f"equal sequences: {found.equal} of {found.sequences}")
    if found.first_difference is not None:
        typer.echo("first difference: sequence {}, token {}".format(*found.first_difference))
    typer.echo(
        f"logits: largest error {found.max_logit_error:.2e}, mean {found.mean_logit_error:.2e}, relative "
        f"{found.relative_logit_error:.2e}; KL divergence {found.kl_divergence:.2e} nats a token"
    )
    if activations:
        table = Table("input of", "largest", "of float16's limit")
        for row in found.activations:
            table.add_row(row.name, f"{row.largest:.4g}", f"{row.half_share:.4%}")
        _console().print(table)
    if layers:
        table = Table("after", "largest error", "mean error", "relative error")
        start = [loaded.config.decoder_start_token_id, *range(4, 10)]
        tokens = torch.tensor([start] * len(batches[0]["input_ids"]))
        for error in block_errors(loaded, batches[0], tokens):
            numbers = (error.max_error, error.mean_error, error.relative_error)
            table.add_row(error.name, *(f"{number:.2e}" for number in numbers))
        _console().print(table)
    if found.share < at_least or found.relative_logit_error > max_relative_error:
        raise typer.Exit(1)


@cache_app.command("path")
def cache_path(cache_dir: CacheDir = None) -> None:
    """Print the folder."""
    typer.echo(str(cache_dir or default_engine_cache_dir()))


@cache_app.command("list")
def cache_list(cache_dir: CacheDir = None) -> None:
    """List the engines, most recently used first."""
    entries = _store(cache_dir).entries()
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
    _console().print(table)
    typer.echo(f"{len(entries)} engines, {sum(entry.size_bytes for entry in entries) / 1e6:.1f} MB")


@cache_app.command("show", epilog="Example: t5-trt cache show 3f2a")
def cache_show(
    key: Annotated[str, typer.Argument(help="the key or its beginning")], cache_dir: CacheDir = None
) -> None:
    """Print an engine's manifest."""
    import json

    found = [entry for entry in _store(cache_dir).entries() if entry.key.startswith(key)]
    if len(found) != 1:
        raise InputError(
            f"{len(found)} engines have a key that begins with {key!r}; expected one. See `t5-trt cache list`."
        )
    typer.echo(json.dumps(found[0].manifest, indent=2))


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
    max_gb: Annotated[float, typer.Option(help="size to keep, in 10**9 bytes")], cache_dir: CacheDir = None
) -> None:
    """Delete the engines used least recently until the rest fits."""
    typer.echo(f"{len(_store(cache_dir).prune(int(max_gb * 1e9)))} engines deleted")


@cache_app.command("clear")
def cache_clear(cache_dir: CacheDir = None) -> None:
    """Delete all engines."""
    typer.echo(f"{_store(cache_dir).clear()} engines deleted")


cli_bench.register(app)


def _lines(path: Path) -> list[str]:
    """Of a text file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {str(path)!r}: {error}. Expected a text file in UTF-8, one text a line."
        ) from error


def _batches(model: str, texts: Path | None, size: int, vocabulary: int) -> list[dict[str, Any]]:
    """Tokenized texts, or without a file three batches of random tokens with padding."""
    import torch

    if texts is not None:
        from t5_trt.checkpoint import load_tokenizer

        tokenizer = load_tokenizer(model)
        lines = _lines(texts)
        chunks = (lines[start : start + size] for start in range(0, len(lines), size))
        return [dict(tokenizer(chunk, return_tensors="pt", padding=True)) for chunk in chunks]
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (8, 20, 40):
        lengths = torch.randint(1, length + 1, (size,), generator=generator)
        mask = (torch.arange(length) < lengths[:, None]).long()
        ids = torch.randint(3, vocabulary, (size, length), generator=generator)
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def _store(cache_dir: Path | None) -> Any:
    from t5_trt.engine.store import EngineStore

    return EngineStore(cache_dir or default_engine_cache_dir())


def _gpu(flavor: str, capabilities: tuple[str, ...]) -> dict[str, Any]:
    import torch

    from t5_trt.runtime.open import gpu_facts

    if capabilities:
        if flavor != "rtx":
            raise InputError(
                f"--compute-capability goes with --flavor rtx; got {flavor!r}, which builds for the GPU here."
            )
        return {"compute_capabilities": list(capabilities)}
    if not torch.cuda.is_available():
        raise BackendError(
            "there is no GPU here to build for. Use --flavor rtx --compute-capability 8.6 (and others) to build without one."
        )
    return gpu_facts(torch.device("cuda", 0))


def _console() -> Console:
    # no markup: messages hold brackets, as in t5-trt[tensorrt]
    return Console(width=None if sys.stdout.isatty() else 160, markup=False)


def spread_values(arguments: list[str], option: str = "--compute-capability") -> list[str]:
    """Repeat an option before each of its values: ``--x 1 2`` becomes ``--x 1 --x 2``, which the parser understands."""
    result: list[str] = []
    open_option = False
    for argument in arguments:
        if argument == option:
            open_option = True
        elif open_option and not argument.startswith("-"):
            result += [option, argument]
        else:
            open_option = False
            result.append(argument)
    return result


def main() -> None:
    """Entry point: errors of the library end with their message and status 1, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("t5_trt").setLevel(logging.INFO)
    try:
        app(args=spread_values(sys.argv[1:]))
    except T5TRTError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
