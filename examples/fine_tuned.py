"""A model fine-tuned in plain PyTorch, then run by t5_trt: in memory first, then saved and loaded again.

    python examples/fine_tuned.py --steps 40 --out fine-tuned

The Hugging Face class learns, for some seconds, to write Kunrei romaji (si, tya) where the shipped model writes Hepburn ones
(shi, cha). TRTT5ForConditionalGeneration.from_model wraps it without a copy or a file: the engines read its weights.
Tokens of the Hugging Face class, the wrapped model and the loaded one are compared; they are equal where both compute in
float32: on a CPU by default, on a GPU with --precision fp32.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from t5_trt import TRTT5ForConditionalGeneration

HERE = Path(__file__).resolve().parent
# in this order: the longer spellings first
KUNREI = {"shi": "si", "sh": "sy", "chi": "ti", "ch": "ty", "ji": "zi", "j": "zy", "tsu": "tu", "fu": "hu"}


def kunrei(hepburn: str) -> str:
    """Kunrei spelling of Hepburn romaji."""
    for old, new in KUNREI.items():
        hepburn = hepburn.replace(old, new)
    return hepburn


def fine_tune(model: Any, tokenizer: Any, sources: list[str], targets: list[str], steps: int) -> None:
    """Plain PyTorch: loss, gradients, AdamW."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = tokenizer(sources, text_target=targets, return_tensors="pt", padding=True).to(device)
    labels = batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)  # -100 takes no part
    model.train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step in range(steps):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            print(f"step {step + 1}: loss {loss.item():.4f}")
    model.eval().cpu()  # from_model takes float32 weights on the CPU


def generate(model: Any, tokenizer: Any, sources: list[str]) -> list[list[int]]:
    batch = tokenizer(sources, return_tensors="pt", padding=True).to(model.device)
    return model.generate(**batch, max_new_tokens=96).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder of the fine-tuned checkpoint; default: a temporary one")
    parser.add_argument("--precision", default="auto", help='of t5_trt: "auto", "fp32", "fp16", ...')
    options = parser.parse_args()

    torch.manual_seed(0)
    name = HERE / "kana_romaji"
    tokenizer = AutoTokenizer.from_pretrained(name)
    hugging_face = T5ForConditionalGeneration.from_pretrained(name)
    sources = (HERE / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:-1]
    hepburn = (HERE / "data" / "kana_romaji_expected.txt").read_text(encoding="utf-8").split("\n")[:-1]
    seen, unseen = slice(0, 32), slice(32, None)
    fine_tune(hugging_face, tokenizer, sources[seen], [kunrei(line) for line in hepburn[seen]], options.steps)

    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        expected = generate(hugging_face, tokenizer, sources[unseen])
        wrapped = TRTT5ForConditionalGeneration.from_model(hugging_face, precision=options.precision)
        print(
            f"from_model: tokens equal to the Hugging Face class: {generate(wrapped, tokenizer, sources[unseen]) == expected}"
        )
        wrapped.save_pretrained(out)
        tokenizer.save_pretrained(out)
        loaded = TRTT5ForConditionalGeneration.from_pretrained(out, precision=options.precision)
        tokens = generate(loaded, tokenizer, sources[unseen])
        print(f"from_pretrained: tokens equal to the Hugging Face class: {tokens == expected}")
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    right = sum(text == kunrei(line) for text, line in zip(texts, hepburn[unseen], strict=True))
    for source, text in zip(sources[unseen], texts, strict=True):
        print(f"{source}\n    {text}")
    print(f"{right} of {len(texts)} lines that were not trained on are right")


if __name__ == "__main__":
    main()
