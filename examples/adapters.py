"""Two LoRA adapters for the shipped model: trained, saved, and served by one model on engines.

    pip install "t5-trt[peft]"
    python examples/adapters.py --steps 40 --out adapters

Each adapter learns another spelling of romaji for some seconds: Kunrei (si, tya for shi, cha), or plain vowels in the place of long ones
(o for ō). The model on engines is what is trained: in training mode it runs the Hugging Face class over the same parameters. Then one model
answers requests that name an adapter. Its tokens are compared with those of the Hugging Face class and peft; they are equal where both
compute in float32: on a CPU by default, on a GPU with --precision fp32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from fine_tuned import generate, kunrei
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, T5ForConditionalGeneration

from t5_trt import TRTT5ForConditionalGeneration

HERE = Path(__file__).resolve().parent
BASE = HERE / "kana_romaji"
PLAIN = str.maketrans("āīūēō", "aiueo")
SPELLINGS = {"kunrei": kunrei, "plain": lambda hepburn: hepburn.translate(PLAIN)}


def lines(name: str) -> list[str]:
    return (HERE / "data" / name).read_text(encoding="utf-8").split("\n")[:-1]


def train(name: str, sources: list[str], targets: list[str], steps: int, out: Path) -> None:
    """Train one adapter on the CPU and write it to a folder."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    batch = tokenizer(sources, text_target=targets, return_tensors="pt", padding=True)
    labels = batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)  # -100 takes no part
    base = TRTT5ForConditionalGeneration.from_pretrained(BASE, backend="onnxruntime")
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q", "v", "o", "wo"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    for step in range(steps):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            print(f"{name}: step {step + 1}: loss {loss.item():.4f}")
    model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder of the adapters; default: a temporary one")
    parser.add_argument("--precision", default="auto", help='of t5_trt: "auto", "fp32", "fp16", ...')
    options = parser.parse_args()
    # peft 0.21 asks Transformers 5.24 by an old name
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)

    torch.manual_seed(0)
    sources, hepburn = lines("kana.txt"), lines("kana_romaji_expected.txt")
    seen, unseen = slice(0, 32), slice(32, None)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        for name, spell in SPELLINGS.items():
            train(name, sources[seen], [spell(line) for line in hepburn[seen]], options.steps, out / name)
        models: list[Any] = []
        for kind, more in (
            (T5ForConditionalGeneration, {}),
            (TRTT5ForConditionalGeneration, {"precision": options.precision}),
        ):
            model = PeftModel.from_pretrained(kind.from_pretrained(BASE, **more), out / "kunrei", adapter_name="kunrei")
            model.load_adapter(out / "plain", adapter_name="plain")
            models.append(model.eval())
    theirs, ours = models

    for name in ("kunrei", "plain", "kunrei", None):  # None: the base model
        start = time.perf_counter()
        if name is not None:
            ours.set_adapter(name)
            theirs.set_adapter(name)
            ours.get_base_model().session  # noqa: B018 - the first generate() would do it
            switched = f", switched in {1e3 * (time.perf_counter() - start):.1f} ms"
            tokens, expected = (generate(model, tokenizer, sources[unseen]) for model in (ours, theirs))
        else:
            switched = ""
            with ours.disable_adapter(), theirs.disable_adapter():
                tokens, expected = (generate(model, tokenizer, sources[unseen]) for model in (ours, theirs))
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        spell = SPELLINGS.get(name or "", str)
        right = sum(text == spell(line) for text, line in zip(texts, hepburn[unseen], strict=True))
        print(f"{name or 'base model'}: {texts[0]}")
        print(f"    {right} of {len(texts)} unseen lines right, tokens equal to peft's: {tokens == expected}{switched}")


if __name__ == "__main__":
    main()
