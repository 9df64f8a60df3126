"""Seq2SeqTrainer.evaluate and predict with predict_with_generate=True: exact match of both classes.

    python examples/seq2seq_evaluation.py
    python examples/seq2seq_evaluation.py MODEL --sources sources.txt --targets targets.txt --num-beams 4

The trainer gets our model in place of Hugging Face's; nothing else changes. It needs the package accelerate. Loss and
metric are those of the Hugging Face class where both compute in float32: on a CPU by default, on a GPU with --precision fp32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
)

from t5_trt import TRTT5ForConditionalGeneration

HERE = Path(__file__).resolve().parent


def decode(tokenizer: Any, rows: np.ndarray) -> list[str]:
    """Texts of token rows; -100 is the trainer's padding."""
    return tokenizer.batch_decode(np.where(rows < 0, tokenizer.pad_token_id, rows), skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(HERE / "kana_romaji"), help="folder or hub id")
    parser.add_argument("--sources", type=Path, default=HERE / "data" / "kana.txt")
    parser.add_argument("--targets", type=Path, default=HERE / "data" / "kana_romaji_expected.txt")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=96, help="tokens of a result")
    parser.add_argument("--precision", default="auto", help='of t5_trt: "auto", "fp32", "fp16", ...')
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sources, targets = (
        path.read_text(encoding="utf-8").split("\n")[:-1] for path in (options.sources, options.targets)
    )
    data = [tokenizer(source, text_target=target) for source, target in zip(sources, targets, strict=True)]

    def exact_match(made: EvalPrediction) -> dict[str, float]:
        pairs = zip(decode(tokenizer, made.predictions), decode(tokenizer, made.label_ids), strict=True)
        return {"exact_match": float(np.mean([text == target for text, target in pairs]))}

    ours = TRTT5ForConditionalGeneration.from_pretrained(options.model, precision=options.precision)
    hugging_face = T5ForConditionalGeneration.from_pretrained(options.model)
    predicted = {}
    # the trainer sets max_length in the model's generation config; beside max_new_tokens Transformers would warn in every batch
    limits = {"max_length": options.max_length, "max_new_tokens": None}
    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            output_dir=folder,
            predict_with_generate=True,
            generation_config=GenerationConfig.from_pretrained(options.model, **limits),
            generation_num_beams=options.num_beams,
            per_device_eval_batch_size=options.batch_size,
            use_cpu=ours.device.type == "cpu",  # the trainer moves a model to a GPU that it sees
            report_to=[],
        )
        for name, model in (("t5_trt", ours), ("transformers", hugging_face)):
            trainer = Seq2SeqTrainer(
                model=model,
                args=arguments,
                data_collator=DataCollatorForSeq2Seq(tokenizer),
                processing_class=tokenizer,
                compute_metrics=exact_match,
            )
            trainer.evaluate(data[: options.batch_size])  # opens or builds the engines
            start = time.perf_counter()
            metrics = trainer.evaluate(data)
            seconds = time.perf_counter() - start
            found = f"exact match {metrics['eval_exact_match']:.3f}, loss {metrics['eval_loss']:.2e}"
            print(f"{name:>12}: {found}, {seconds:.2f} s")
            predicted[name] = decode(tokenizer, trainer.predict(data).predictions)
    same = sum(a == b for a, b in zip(predicted["t5_trt"], predicted["transformers"], strict=True))
    print(f"predict: {same} of {len(data)} texts are equal")


if __name__ == "__main__":
    main()
