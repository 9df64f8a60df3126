"""A whole file through a model with generate_many: batches of similar length, a progress bar, results line by line.

    python examples/transliterate_file.py examples/data/kana.txt romaji.txt
    python examples/transliterate_file.py input.txt output.txt --model MODEL --batch-size 32 --num-beams 4

The output is written to a file beside it and renamed at the end: whoever reads OUTPUT finds the old file or the whole
new one, and nothing is left behind when the run fails. Empty lines stay empty, so line n belongs to line n.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from transformers import AutoTokenizer

from t5_trt import TRTT5ForConditionalGeneration, generate_many

SHIPPED = Path(__file__).resolve().parent / "kana_romaji"


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name only when all of it is written."""
    path = path.resolve()  # a link keeps pointing to the file
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave a renamed but empty file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="texts, one a line")
    parser.add_argument("output", type=Path, help="results, one a line")
    parser.add_argument("--model", default=str(SHIPPED), help="folder or hub id of a T5 checkpoint")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="default: on a terminal")
    options = parser.parse_args()

    with options.input.open(encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in file]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = TRTT5ForConditionalGeneration.from_pretrained(options.model)
    results = generate_many(
        model,
        tokenizer,
        [line for line in lines if line.strip()],
        batch_size=options.batch_size,
        show_progress=options.progress,
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
    )
    with written_whole(options.output) as file:
        for line in lines:
            file.write((next(results) if line.strip() else "") + "\n")
    print(f"{len(lines)} lines written to {options.output}")


if __name__ == "__main__":
    main()
