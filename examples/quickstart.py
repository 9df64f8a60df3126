"""One changed import: the same text through Transformers' T5 class and through t5_trt's, with results and times.

    python examples/quickstart.py                                   # the model in examples/kana_romaji
    python examples/quickstart.py MODEL --text "文章" --num-beams 4   # a folder or a hub id: sonoisa/t5-base-japanese

A checkpoint that is only pre-trained, as sonoisa/t5-base-japanese is, writes no useful text before it is fine-tuned;
tokens and times can be compared all the same. On a GPU the first call builds engines, which takes a while and happens
once; it is not part of the times below. The tokens are equal where both compute in float32: on a CPU by default, on a
GPU with --precision fp32.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, T5ForConditionalGeneration

from t5_trt import TRTT5ForConditionalGeneration

SHIPPED = Path(__file__).resolve().parent / "kana_romaji"


def timed_generate(model: Any, batch: Any, num_beams: int, max_new_tokens: int) -> tuple[list[list[int]], float]:
    """Tokens and seconds; the code is the same for both classes."""
    batch = batch.to(model.device)
    model.generate(**batch, num_beams=num_beams, max_new_tokens=max_new_tokens)  # opens or builds the engines
    start = time.perf_counter()
    tokens = model.generate(**batch, num_beams=num_beams, max_new_tokens=max_new_tokens).tolist()
    return tokens, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED), help="folder or hub id of a T5 checkpoint")
    parser.add_argument("--text", default="わたしは コーヒーを のみます。")
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--precision", default="auto", help='of t5_trt: "auto", "fp32", "fp16", ...')
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    before = T5ForConditionalGeneration.from_pretrained(options.model).eval()
    after = TRTT5ForConditionalGeneration.from_pretrained(options.model, precision=options.precision)
    before.to(after.device)

    batch = tokenizer([options.text], return_tensors="pt")
    tokens, times_s = {}, {}
    for name, model in (("transformers", before), ("t5_trt", after)):
        tokens[name], times_s[name] = timed_generate(model, batch, options.num_beams, options.max_new_tokens)
        text = tokenizer.decode(tokens[name][0], skip_special_tokens=True)
        print(f"{name:>12}: {text}   ({times_s[name] * 1e3:.1f} ms)")
    print(f"same tokens: {'yes' if tokens['t5_trt'] == tokens['transformers'] else 'no'}")
    print(f"{times_s['transformers'] / times_s['t5_trt']:.1f} times as fast, backend {after.session.backend}")


if __name__ == "__main__":
    main()
