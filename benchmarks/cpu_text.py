"""Count sentences of the shipped model, and tokens of T5-base shapes, that stay those of float32 on a CPU.

Each precision is compared with Hugging Face's class in float32: 1,000 sentences through the model that the repository ships, greedy and
with 4 beams, one at a time and in batches; and greedy tokens of T5-base shapes with random weights, freely and given the tokens before. A
record replaces an older one of its case.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.cpu_peers import equal_share
from benchmarks.kernel_tokens import sentences
from benchmarks.token_differences import differences
from t5_trt.tools.records import Record, read_records, write_records
from tests.conftest import SHIPPED

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-text.json"
#: precision -> least share of equal sentences; None: recorded only
PRECISIONS: dict[str, float | None] = {"bf16": 0.995, "int8": 0.995, "int4": 0.99}
BATCHES, BEAMS = (1, 16), (1, 4)
NEW_TOKENS = 99
CASE = ("model", "precision", "num_beams", "batch")


def main() -> None:
    """Command line: compare, print, and write; the status is 1 if a precision falls short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--shape", default="t5-base")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    from t5_trt.tools.environment import environment

    facts, good = environment(), True
    for part in given.parts:
        for record in PARTS[part](given):
            store(given.json, record | facts)
            print(" ".join(f"{name}={value}" for name, value in record.items() if name != "differences"), flush=True)
            good &= record.get("good", True)
    sys.exit(0 if good else 1)


def shipped(given: argparse.Namespace) -> Iterator[Record]:
    """Sentences through the model that the repository ships."""
    import logging

    from transformers import AutoTokenizer, T5ForConditionalGeneration

    from t5_trt import TRTT5ForConditionalGeneration

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns in every call about max_length
    tokenizer, texts = AutoTokenizer.from_pretrained(SHIPPED), sentences(given.sentences)

    def run(model: Any, size: int, beams: int) -> list[list[int]]:
        made: list[list[int]] = []
        for first in range(0, len(texts), size):
            inputs = tokenizer(texts[first : first + size], return_tensors="pt", padding=True)
            made += model.generate(**inputs, num_beams=beams, max_new_tokens=96).tolist()
        return made

    reference = T5ForConditionalGeneration.from_pretrained(SHIPPED).eval()
    expected = {beams: run(reference, 50, beams) for beams in BEAMS}
    for precision in given.precisions:
        ours, least = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, precision=precision), PRECISIONS[precision]
        for beams in BEAMS:
            for size in BATCHES:
                found = differences(run(ours, size, beams), expected[beams])
                share = 1 - len(found) / len(texts)
                yield {
                    "model": "kana_romaji", "precision": precision, "num_beams": beams, "batch": size, "sentences": len(texts),
                    "sentences_equal": len(texts) - len(found), "good": least is None or share >= least,
                    "differences": [str(each) for each in found],
                }  # fmt: skip


def random_weights(given: argparse.Namespace) -> Iterator[Record]:
    """Greedy tokens of random weights, which show rounding much more than trained ones do."""
    from t5_trt import TRTT5ForConditionalGeneration
    from t5_trt.tools.random_models import random_source, random_t5

    source = random_source(8, 32)
    limits = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        reference = random_t5(given.shape)
        expected = reference.generate(source, **limits)
        reference.save_pretrained(folder)
        for precision in given.precisions:
            ours = TRTT5ForConditionalGeneration.from_pretrained(folder, precision=precision)
            given_before = ours(input_ids=source, decoder_input_ids=expected[:, :-1]).logits.argmax(-1)
            yield {
                "model": f"{given.shape} shapes, random weights, seed 0", "precision": precision, "num_beams": 1, "batch": len(source),
                "new_tokens": NEW_TOKENS,
                "tokens_equal": equal_share(ours.generate(source, **limits).tolist(), expected.tolist()),
                "tokens_equal_given_those_before": equal_share(given_before.tolist(), expected[:, 1:].tolist()),
            }  # fmt: skip


def store(file: Path, record: Record) -> None:
    """Put a record into a file in place of an older one of its case."""
    case = [record[name] for name in CASE]
    kept = [older for older in read_records(file) if [older[name] for name in CASE] != case]
    write_records(file, [*kept, record])


PARTS = {"shipped": shipped, "random": random_weights}

if __name__ == "__main__":
    main()
