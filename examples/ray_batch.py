"""A text file through T5 on many machines: Ray Data `map_batches`, one actor per GPU (or several on CPUs).

One line is one text, and the output has one line for each, in the same order. The lines are cut into numbered shards; a
finished shard is renamed into ``OUTPUT.shards`` in one step. So a worker that is killed costs only the shards it had in
hand, and the same command started again goes on where the last one stopped. All machines need t5_trt, and `MODEL` and
the engine store under the same paths, on a shared disk; the text itself travels through Ray.

    pip install "t5-trt[ray]"
    python examples/ray_batch.py examples/kana_romaji examples/data/kana.txt romaji.txt --workers 2
    python examples/ray_batch.py MODEL in.txt out.txt --address auto --engine-cache-dir /shared/engines --num-beams 4

The first actor builds the engines that are missing; the others wait for them and read the store. Ray starts a dead worker
again without limit: where the bar stands still, look for a text that kills whoever takes it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm


@dataclass(frozen=True)
class Job:
    """What decides the contents of a shard; kept beside the shards, because shards of two jobs must not mix."""

    input_sha256: str
    model: str
    precision: str
    shard_lines: int
    max_source_tokens: int | None
    num_beams: int
    max_new_tokens: int


class Worker:
    """One model in one actor. Ray Data starts a new one in the place of one that died, and gives it the same shards."""

    def __init__(self, job: Job, batch_size: int, load: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        from t5_trt import TRTT5ForConditionalGeneration

        self.job, self.batch_size = job, batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(job.model)
        self.model = TRTT5ForConditionalGeneration.from_pretrained(job.model, precision=job.precision, **load)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The results of the shards in a batch, as lines."""
        return {"shard": batch["shard"], "lines": [self._generate(lines) for lines in batch["lines"]]}

    def _generate(self, lines: str) -> str:
        from t5_trt import generate_many

        results = generate_many(
            self.model,
            self.tokenizer,
            str(lines).split("\n"),
            batch_size=self.batch_size,
            max_source_tokens=self.job.max_source_tokens,
            show_progress=False,
            num_beams=self.job.num_beams,
            max_new_tokens=self.job.max_new_tokens,
        )
        return "\n".join(re.sub(r"[\r\n]+", " ", result) for result in results)


class Shards:
    """The folder of finished shards.

    Raises:
        SystemExit: the folder belongs to another input or to other settings.
    """

    def __init__(self, folder: Path, job: Job, lines: list[str]) -> None:
        self.folder, self.lines, self.size = folder, lines, job.shard_lines
        self.count = -(-len(lines) // self.size)
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "job.json"
        wanted = asdict(job)
        if not record.exists():
            _write(record, json.dumps(wanted, indent=1) + "\n")
        found = json.loads(record.read_text(encoding="utf-8"))
        if found != wanted:
            names = ", ".join(name for name, value in wanted.items() if found.get(name) != value)
            raise SystemExit(
                f"{folder} holds shards of another run; different: {names}. Finish that run, or remove the folder."
            )

    def path(self, shard: int) -> Path:
        """Where a finished shard lies."""
        return self.folder / f"shard-{shard:06d}.txt"

    def source(self, shard: int) -> list[str]:
        """The texts of a shard."""
        return self.lines[shard * self.size : (shard + 1) * self.size]

    def missing(self) -> list[int]:
        """Shards that are not finished, in order."""
        return [shard for shard in range(self.count) if not self.path(shard).exists()]

    def write(self, shard: int, lines: str) -> int:
        """Keep a shard's results; the number of its texts."""
        found, expected = lines.count("\n") + 1, len(self.source(shard))
        if found != expected:
            raise RuntimeError(f"shard {shard} got {found} results; expected {expected}.")
        _write(self.path(shard), lines + "\n")
        return expected

    def merge(self, output: Path) -> None:
        """Write all shards as one file."""
        temporary = _sibling(output)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for shard in range(self.count):
                file.write(self.path(shard).read_text(encoding="utf-8"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    temporary = _sibling(path)
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def generate_shards(shards: Shards, job: Job, options: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """(shard, its results as lines) for all missing shards, as they are finished, in no order."""
    missing = shards.missing()
    if not missing:
        return
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    on_gpu = gpus > 0 and options.cpus_per_worker is None
    workers = options.workers or (gpus if on_gpu else max(1, int(resources["CPU"] // (options.cpus_per_worker or 1))))
    load: dict[str, Any] = {"engine_cache_dir": options.engine_cache_dir}
    if not on_gpu:
        load.update(backend="onnxruntime", num_threads=options.cpus_per_worker or 1)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts texts
    # a block and a batch are one shard: a shard is handed back as soon as it is done, and a lost one is made again alone
    rows = [{"shard": shard, "lines": "\n".join(shards.source(shard))} for shard in missing]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        fn_constructor_args=(job, options.batch_size, load),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing)), max_tasks_in_flight_per_actor=2),
        num_gpus=1 if on_gpu else None,
        num_cpus=None if on_gpu else options.cpus_per_worker or 1,
    )
    for row in dataset.iter_rows():
        yield int(row["shard"]), row["lines"]


def run(options: argparse.Namespace) -> tuple[int, int]:
    """Do the job; the numbers of shards that were made now and that were there."""
    content = options.input.read_bytes()
    lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    job = Job(
        input_sha256=hashlib.sha256(content).hexdigest(),
        # workers have another current folder
        model=str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model,
        precision=options.precision,
        shard_lines=options.shard_lines,
        max_source_tokens=options.max_source_tokens,
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
    )
    shards = Shards(options.output.with_name(options.output.name + ".shards"), job, lines)
    missing = shards.missing()
    skipped = shards.count - len(missing)
    waiting = sum(len(shards.source(shard)) for shard in missing)
    with tqdm(total=len(lines), initial=len(lines) - waiting, unit="text") as bar:
        for shard, results in generate_shards(shards, job, options):
            bar.update(shards.write(shard, results))
    shards.merge(options.output)
    return len(missing), skipped


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, join or start a cluster, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a hub id, or a folder that all machines see")
    parser.add_argument("input", type=Path, help="one text a line, UTF-8")
    parser.add_argument("output", type=Path)
    parser.add_argument("--address", help="of a Ray cluster; default RAY_ADDRESS, else this machine alone")
    parser.add_argument("--workers", type=int, help="actors; default one per GPU, else what the CPUs allow")
    parser.add_argument("--cpus-per-worker", type=int, help="run on CPUs, with so many threads each")
    parser.add_argument("--engine-cache-dir", default=os.environ.get("T5_TRT_CACHE"), help="shared store of engines")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--shard-lines", type=int, default=512, help="texts in a shard: what a lost worker costs")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-source-tokens", type=int, help="cut longer texts")
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    for name in ("shard_lines", "batch_size", "num_beams", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} got {getattr(options, name)}; expected at least 1.")
    if not ray.is_initialized():
        ray.init(address=options.address, include_dashboard=None if options.address else False)
    made, skipped = run(options)
    print(f"{options.output}: {made} shards made, {skipped} were there")


if __name__ == "__main__":
    main()
