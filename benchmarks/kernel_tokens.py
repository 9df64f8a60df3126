"""Compare the tokens of decoding on a GPU with Hugging Face's.

Models are T5-base shapes in float16, the shipped model, the families, and checkpoints that overflow float16.

    python -m benchmarks.kernel_tokens PART --out FOLDER [--backends cuda,tensorrt-kernels,tensorrt-engine]

rows      of 32 rows of T5-base shapes, how many keep the tokens of float32: ours and Hugging Face's own float16, several seeds
shipped   sentences through the model that the repository ships, in batches, greedy and with 4 beams, float32, float16 and int8
families  models of two layers in float32, small ones and of published sizes, and checkpoints that overflow float16

Everything is compared with Hugging Face's class in float32 on the same GPU, TF32 off. Where tokens differ in float32, the row, the step
and the gap between the two best logits there are printed: a tie says nothing about either side.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import kernel_models
from benchmarks.kernel_models import base_name, keep, named_backends, on_device, open_model, t5_base
from benchmarks.token_differences import Difference, differences, equal_rows, greedy_gaps
from t5_trt.tools.records import Record
from tests.conftest import ROOT, SHIPPED
from tests.tiny_models import batch, make_hugging_face

ROWS, SOURCE_TOKENS, NEW_TOKENS = 32, 32, 99
SIZES, BEAMS = (1, 7, 16), (1, 4)
#: precision -> sentences, of which so many must be equal in each batch size and search
SENTENCES = {"fp32": (500, 500), "fp16": (1000, 999), "int8": (1000, 980)}
#: kinds of `tests.tiny_models` with two layers in each stack
FAMILIES = ("t5-v1.1", "mt5", "byt5", "umt5", "ul2")
SEEDS = (0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and write; the status is 1 if something fell short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--backends", help="comma-separated; default: cuda, and in rows all that can run here")
    parser.add_argument("--store", type=Path, default=Path("/var/tmp/t5_trt-kernel-engines"), help="of engines")
    parser.add_argument("--layers", type=int, default=12, help="of T5-base shapes")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many, of weights")
    parser.add_argument("--sentences", type=int, help="fewer, to try it")
    parser.add_argument("--precisions", default=",".join(SENTENCES), help="comma-separated, of the shipped model")
    given = parser.parse_args(arguments)
    if given.backends is None and given.part != "rows":
        given.backends = "cuda"  # TensorRT would build engines for every size
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    good = True
    for record in PARTS[given.part](given):
        good &= record["good"]
        keep(given.out, f"tokens-{given.part}", [record], record["backend"])
        print(" ".join(f"{name}={value}" for name, value in record.items() if name not in {"differences"}), flush=True)
    sys.exit(0 if good else 1)


def rows(given: argparse.Namespace) -> Iterator[Record]:
    """Rows of T5-base shapes whose tokens in float16 are those of float32."""
    for seed in range(given.seeds):
        plain = t5_base(given.layers, seed)
        request = on_device(row_request())
        hugging_face = copy.deepcopy(plain).to(kernel_models.DEVICE)
        with torch.no_grad():
            expected = hugging_face.generate(**request, output_logits=True, return_dict_in_generate=True)
            theirs = hugging_face.half().generate(**request)
        wanted = expected.sequences
        least = equal_rows(theirs, wanted)
        for backend in named_backends(given.backends):
            start, found = time.perf_counter(), None
            record: Record = {
                "model": base_name(given.layers, seed), "precision": "fp16", "backend": backend, "batch": len(wanted), "num_beams": 1,
                "source_tokens": SOURCE_TOKENS, "new_tokens": NEW_TOKENS, "hf_fp16_rows_equal": least,
            }  # fmt: skip
            try:
                got = open_model(backend, plain, "fp16", given.store).generate(**request)
                found = differences(got.tolist(), wanted.tolist(), greedy_gaps(expected.logits))
            except Exception as error:  # the other backends are worth their time
                record |= {"failed": f"{type(error).__name__}: {error}"[:300], "good": False}
            if found is not None:
                equal = len(wanted) - len(found)
                record |= {"rows_equal": equal, "good": equal >= least or backend == "tensorrt-engine"}
                record["differences"] = [str(each) for each in found]
            yield {**record, "seconds": round(time.perf_counter() - start, 1)}


def row_request() -> dict[str, Any]:
    """A batch of sources and a fixed number of new tokens."""
    from t5_trt.tools.random_models import random_source

    ids = random_source(ROWS, SOURCE_TOKENS)
    fixed = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **fixed}


def shipped(given: argparse.Namespace) -> Iterator[Record]:
    """Sentences through the model that the repository ships."""
    import logging

    from transformers import AutoTokenizer, T5ForConditionalGeneration

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns in every call about max_length
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    plain = T5ForConditionalGeneration.from_pretrained(SHIPPED).eval()
    hugging_face = copy.deepcopy(plain).to(kernel_models.DEVICE)
    most = given.sentences or max(count for count, _ in SENTENCES.values())
    texts = sentences(most)

    def run(model: Any, texts: list[str], size: int, beams: int) -> list[list[int]]:
        made: list[list[int]] = []
        for first in range(0, len(texts), size):
            inputs = tokenizer(texts[first : first + size], return_tensors="pt", padding=True)
            made += model.generate(**on_device(dict(inputs)), num_beams=beams, max_new_tokens=96).tolist()
        return made

    with torch.no_grad():
        expected = {beams: run(hugging_face, texts, 50, beams) for beams in BEAMS}
    for backend in named_backends(given.backends):
        for precision in given.precisions.split(","):
            wanted, least = SENTENCES[precision]
            ours, count = open_model(backend, plain, precision, given.store), min(wanted, most)
            for beams in BEAMS:
                gaps = teacher_gaps(hugging_face, tokenizer, texts, expected[beams])
                for size in SIZES:
                    start = time.perf_counter()
                    found = differences(run(ours, texts[:count], size, beams), expected[beams][:count], gaps)
                    if precision == "fp32":
                        show(f"{backend} {precision} batch {size} beams {beams}", found)
                    yield {
                        "model": f"kana_romaji, {count} sentences", "precision": precision, "backend": backend, "batch": size,
                        "num_beams": beams, "sentences": count, "sentences_equal": count - len(found),
                        "good": len(found) <= -(-(wanted - least) * count // wanted), "seconds": round(time.perf_counter() - start, 1),
                        "differences": [str(each) for each in found],
                    }  # fmt: skip


def sentences(count: int) -> list[str]:
    """Of one to five words each, always the same."""
    words = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split()
    chooser = random.Random(0)
    return [" ".join(chooser.choices(words, k=chooser.randint(1, 5))) for _ in range(count)]


def teacher_gaps(
    hugging_face: Any, tokenizer: Any, texts: list[str], expected: list[list[int]]
) -> Callable[[int, int], tuple[float, float]]:
    """(row, step) -> the gap between the two best logits behind the expected tokens, and the logits' spread."""

    def gap(row: int, step: int) -> tuple[float, float]:
        inputs = on_device(dict(tokenizer([texts[row]], return_tensors="pt")))
        ids = torch.tensor([expected[row][: step + 1]], device=kernel_models.DEVICE)
        with torch.no_grad():
            logits = hugging_face(**inputs, decoder_input_ids=ids).logits[0, -1]
        best = logits.topk(2).values
        return float(best[0] - best[1]), float(logits.std())

    return gap


def families(given: argparse.Namespace) -> Iterator[Record]:
    """Models of two layers: float32, and float16 of those that overflow it."""
    from benchmarks.engine_text import small_overflowing
    from benchmarks.engines import FAMILIES as PUBLISHED
    from benchmarks.engines import family

    for kind in FAMILIES:
        for seed in range(given.seeds):
            hugging_face = make_hugging_face(kind, seed=seed, num_layers=2, num_decoder_layers=2)
            yield from family_records(given, f"{kind}, 2 layers, seed {seed}", hugging_face, "fp32", both_requests())
    for kind in PUBLISHED:
        yield from family_records(given, f"{kind}, 2 layers of published sizes", family(kind), "fp32", both_requests())
    for name, (hugging_face, request) in small_overflowing().items():
        yield from family_records(given, name, hugging_face, "fp16", {"greedy": request})


def both_requests() -> dict[str, dict[str, Any]]:
    """Greedy and beams over a batch with padding, and of one row."""
    fixed = {"max_new_tokens": 40, "min_new_tokens": 40}
    return {
        f"{name}, {count} rows": {**batch(count), **fixed, "num_beams": beams}
        for count in (1, 3)
        for name, beams in (("greedy", 1), ("beams", 4))
    }


def family_records(
    given: argparse.Namespace, name: str, plain: Any, precision: str, requests: dict[str, dict[str, Any]]
) -> Iterator[Record]:
    """One model on all backends."""
    hugging_face = copy.deepcopy(plain).to(kernel_models.DEVICE)
    for backend in named_backends(given.backends):
        ours = open_model(backend, copy.deepcopy(plain), precision, given.store)
        equal, total, found, finite = 0, 0, [], True
        for what, request in requests.items():
            request = on_device(request)
            asked = {**request, "output_logits": True, "return_dict_in_generate": True}
            with torch.no_grad():
                expected = hugging_face.generate(**asked)
            finite &= all(bool(step.isfinite().all()) for step in ours.generate(**asked).logits)
            greedy = asked.get("num_beams", 1) == 1
            gaps = greedy_gaps(expected.logits) if greedy else None
            # without logits: the loop that is fastest
            differing = differences(ours.generate(**request).tolist(), expected.sequences.tolist(), gaps)
            show(f"{backend} {name}, {what}", differing)
            found += [f"{what}: {each}" for each in differing]
            total += len(expected.sequences)
            equal += len(expected.sequences) - len(differing)
        yield {
            "model": name, "precision": precision, "backend": backend, "rows": total, "rows_equal": equal, "finite": finite,
            "good": finite and equal == total, "differences": found,
        }  # fmt: skip


def show(what: str, found: list[Difference]) -> None:
    """Print the first differences."""
    for each in found[:4]:
        print(f"{what}: {each}", flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Record]]] = {
    "rows": rows,
    "shipped": shipped,
    "families": families,
}

if __name__ == "__main__":
    main()
