"""Japanese kana through the shipped model with `generate()`, on engines and on the Hugging Face class: lines, tokens, times."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from t5_trt import TRTT5ForConditionalGeneration

HERE = Path(__file__).resolve().parent
MODEL = HERE / "kana_romaji"


def transliterate(model: Any, tokenizer: Any, lines: list[str], batch_size: int) -> list[str]:
    """Greedy `generate()` in batches; works with any encoder-decoder model."""
    results = []
    for start in range(0, len(lines), batch_size):
        batch = tokenizer(lines[start : start + batch_size], return_tensors="pt", padding=True)
        tokens = model.generate(**batch, max_new_tokens=96)
        results += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return results


def main() -> None:
    """Print every line with its transliteration, then both times."""
    torch.set_num_threads(2)
    lines = (HERE / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:-1]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    models = {
        "t5_trt": TRTT5ForConditionalGeneration.from_pretrained(MODEL),
        "transformers": T5ForConditionalGeneration.from_pretrained(MODEL).eval(),
    }
    outputs, times_s = {}, {}
    for name, model in models.items():
        transliterate(model, tokenizer, lines[:2], 1)  # opens the engines
        start = time.perf_counter()
        outputs[name] = transliterate(model, tokenizer, lines, 1)
        times_s[name] = time.perf_counter() - start
    for line, romaji in zip(lines, outputs["t5_trt"], strict=True):
        print(f"{line}\n    {romaji}")
    same = sum(a == b for a, b in zip(outputs["t5_trt"], outputs["transformers"], strict=True))
    print(f"\n{len(lines)} lines, one at a time: {same} of {len(lines)} equal to the Hugging Face class")
    for name, seconds in times_s.items():
        print(f"{name:>12}: {seconds:6.2f} s, {seconds / len(lines) * 1e3:6.1f} ms a line")
    print(
        f"backend {models['t5_trt'].session.backend}, {times_s['transformers'] / times_s['t5_trt']:.1f} times as fast"
    )


if __name__ == "__main__":
    main()
