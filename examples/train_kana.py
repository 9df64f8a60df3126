"""Trains a small T5 v1.1 that transliterates Japanese kana to modified-Hepburn romaji, and writes it to a folder.

All data is made by rule (see `kana_rules`), so nothing is downloaded: random kana words, everyday words and sentence
patterns, each paired with the romaji that `romanize` gives. A twentieth of all words, picked by hash, never occurs in
training and makes up the evaluation. The script writes the weights, the configuration, a SentencePiece tokenizer,
`metrics.json` and a model card that `AutoTokenizer` and `T5ForConditionalGeneration` load as they are. It trains
nothing but this example model: it reads no corpus, knows no kanji and is no general fine-tuning tool.

Example:
    python examples/train_kana.py --out examples/kana_romaji --steps 4000 --batch-size 1024
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# cuBLAS is only deterministic with a fixed workspace, and it reads this variable when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import sentencepiece
import torch
import transformers
from kana_rules import NOUNS, PUNCTUATION, is_held_out, random_sentence, random_word, romanize, vocabulary
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

__all__ = ["Evaluation", "evaluate", "main", "romanize"]

Pair = tuple[str, str]
MAX_TOKENS = 96
_README = """---
license: apache-2.0
language: ja
library_name: transformers
pipeline_tag: text2text-generation
---

# kana_romaji

A small T5 v1.1 ({parameters:,} parameters, {layers} encoder and {layers} decoder layers) that turns Japanese kana,
words or short sentences, into modified-Hepburn romaji in lower case: `わたしは コーヒーを のみます。` becomes
`watashiha kōhīwo nomimasu.` It exists as an example and a test model; the rule it learnt is `romanize` in
`examples/kana_rules.py`, which is exact and much faster.

## Rules

- Hiragana and katakana read alike; extended katakana too (ファ fa, ティ ti, ウィ wi, チェ che, ヴ vu).
- っ doubles the next consonant (`tch` before ch) and is an apostrophe where there is none: まっちゃ matcha, あっ a'.
- おう, おお and ー give ō; うう ū; ああ ā; ええ ē; いい stays ii, イー is ī, えい stays ei.
- ん is n, before a vowel or y n': ほんや hon'ya.
- Particles are written as spelt: は ha, へ he, を wo. Words are not looked up, so おもう is omō.
- 、 。 ? ! and 「」 become , . ? ! and " with a space where romaji needs one; digits pass through.
- Other characters, Latin letters and kanji among them, are outside what the model learnt. Inputs of up to about 50
  characters were trained.

## Accuracy

Exact match, greedy decoding, on words (sentences: nouns) that were no words of the training text; shorter ones may be part of a longer one there:

| Held-out set | Exact | Accuracy |
| --- | --- | --- |
| words | {words_exact} of {words_total} | {words_accuracy:.2%} |
| sentences | {sentences_exact} of {sentences_total} | {sentences_accuracy:.2%} |

`metrics.json` holds these figures with the seed, the steps, the versions and the device.

## Weights

`model.safetensors` holds `lm_head.weight` beside `shared.weight`, as every T5 v1.1 checkpoint does, with equal values:
transformers 5 ties the two in every T5 and would warn about different ones. The logits are not scaled
(`tie_word_embeddings` is false in `config.json`).

## Retrain

    python examples/train_kana.py --out examples/kana_romaji --steps {steps} --batch-size {batch_size} --seed {seed}

All training data is made by that script; the same seed on the same device and versions gives the same model. The
model and its data are under the Apache License 2.0.
"""


class Evaluation(NamedTuple):
    """Result of an exact-match evaluation."""

    exact: int
    total: int
    misses: list[tuple[str, str, str]]

    @property
    def accuracy(self) -> float:
        """Share of the pairs that came out exactly right."""
        return self.exact / max(self.total, 1)


class Encoded(NamedTuple):
    """Token ids of all training pairs, zero-padded, with their lengths."""

    sources: torch.Tensor
    targets: torch.Tensor
    source_lengths: torch.Tensor
    target_lengths: torch.Tensor


def build_tokenizer(folder: Path) -> T5Tokenizer:
    """Writes `spiece.model` with the fixed vocabulary and returns the tokenizer that reads it.

    Args:
        folder: Existing folder to write to.

    Returns:
        The tokenizer, without sentinel tokens.
    """
    # Training on one line only yields SentencePiece's own normalisation tables (NFKC with case scaling) in a valid
    # model; the pieces are then replaced. The iterator keeps file names out of the model.
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["かな kana"]), model_writer=buffer, model_type="unigram", vocab_size=12,
        hard_vocab_limit=False, normalization_rule_name="nmt_nfkc_cf", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", num_threads=1, minloglevel=2,
    )  # fmt: skip
    messages: Any = sentencepiece_model_pb2  # generated code, without types
    proto = messages.ModelProto()
    proto.ParseFromString(buffer.getvalue())
    special = list(proto.pieces[:3])
    del proto.pieces[3:]
    for rank, piece in enumerate(vocabulary()[len(special) :]):
        # Nearly equal scores make the fewest pieces win, so text splits into whole morae.
        proto.pieces.add(piece=piece, score=-10.0 - rank / 1024)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    (folder / "spiece.model").write_bytes(proto.SerializeToString())
    options: dict[str, Any] = {"extra_ids": 0, "model_max_length": MAX_TOKENS, "clean_up_tokenization_spaces": False}
    tokenizer: T5Tokenizer = T5Tokenizer.from_pretrained(str(folder), **options)
    return tokenizer


def build_model(vocab_size: int, seed: int) -> T5ForConditionalGeneration:
    """Creates the untrained model from a seed."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": vocab_size, "d_model": 128, "d_kv": 32, "d_ff": 384, "num_layers": 3, "num_decoder_layers": 3,
        "num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    config = T5Config(**options)
    config._attn_implementation = "eager"  # the fused kernels' backward pass is not deterministic
    model = T5ForConditionalGeneration(config)
    # The library starts the embeddings at unit variance, which without logit scaling begins at a huge loss.
    torch.nn.init.normal_(model.shared.weight, std=config.d_model**-0.5)
    return model


def training_texts(words: int, sentences: int, seed: int) -> list[str]:
    """Makes kana words and sentences that contain no held-out word.

    Args:
        words: How many random words, besides the everyday ones.
        sentences: How many random sentences.
        seed: Seed of the generators.

    Returns:
        The texts, in a fixed order.
    """
    rng = random.Random(seed)
    texts = [word for word in NOUNS if not is_held_out(word)] * 5
    candidates = iter(lambda: random_word(rng), "")  # endless: no word is empty
    texts += _take((word for word in candidates if not is_held_out(word)), words, "words")
    drafts = iter(lambda: random_sentence(rng), "")
    splits = str.maketrans(dict.fromkeys(PUNCTUATION.replace("ー", ""), " "))
    clean = (text for text in drafts if not any(is_held_out(part) for part in text.translate(splits).split()))
    return texts + _take(clean, sentences, "sentences")


def _take(source: Iterator[str], count: int, label: str) -> list[str]:
    return [next(source) for _ in tqdm(range(count), desc=label, unit_scale=True, mininterval=1.0)]


def held_out_pairs(words: int, sentences: int, seed: int, seen: set[str]) -> tuple[list[Pair], list[Pair]]:
    """Makes evaluation pairs that are not in `seen`: held-out words, and sentences whose nouns are all held out."""
    rng = random.Random(f"evaluation {seed}")
    kept = dict.fromkeys(word for word in NOUNS if is_held_out(word))
    pool = dict(kept)
    while len(pool) < max(words, 500):
        word = random_word(rng)
        if is_held_out(word) and word not in seen:
            pool[word] = None
    nouns = list(pool)
    # Everyday words are few, so they are repeated to fill about half of the noun slots.
    mixed = nouns + list(kept) * (len(nouns) // max(len(kept), 1))
    lines: dict[str, None] = {}
    while len(lines) < sentences:
        text = random_sentence(rng, mixed, max_chars=40)
        if text not in seen:
            lines[text] = None
    return [(word, romanize(word)) for word in nouns[:words]], [(text, romanize(text)) for text in lines]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Encoded:
    """Tokenizes kana texts and their romaji into padded tensors."""
    columns: list[torch.Tensor] = []
    for side in (list(texts), [romanize(text) for text in texts]):
        ids: list[list[int]] = tokenizer(side)["input_ids"]
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
        padded[torch.arange(padded.shape[1]) < lengths[:, None]] = torch.tensor([token for row in ids for token in row])
        if padded.shape[1] > MAX_TOKENS:
            raise ValueError(f"a training text has {padded.shape[1]} tokens, more than the {MAX_TOKENS} allowed")
        columns += [padded, lengths]
    return Encoded(columns[0], columns[2], columns[1], columns[3])


def batches(data: Encoded, batch_size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields index tensors of similarly long examples, in an order that only the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    lengths = data.source_lengths + data.target_lengths
    done = 0
    while done < steps:
        order = torch.randperm(len(lengths), generator=generator)
        groups: list[torch.Tensor] = []
        for chunk in torch.split(order, batch_size * 32):
            groups += torch.split(chunk[lengths[chunk].argsort(stable=True)], batch_size)
        for index in torch.randperm(len(groups), generator=generator).tolist()[: steps - done]:
            yield groups[index]
            done += 1


def train(model: T5ForConditionalGeneration, data: Encoded, steps: int, batch_size: int, seed: int) -> float:
    """Trains in place with AdamW, a linear warm-up and a cosine decay.

    Args:
        model: Model on the device to train on.
        data: Encoded training pairs.
        steps: Optimiser steps.
        batch_size: Examples in a step.
        seed: Seed of the example order.

    Returns:
        The loss of the last step.
    """
    peak, warmup = 2e-3, max(1, min(400, steps // 10))

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    device = model.device
    sources, targets = data.sources.to(device), data.targets.to(device)
    model.train()
    loss = torch.zeros(())
    progress = tqdm(batches(data, batch_size, steps, seed), total=steps, desc="train", mininterval=5.0)
    for step, rows in enumerate(progress):
        here = rows.to(device)
        input_ids = sources[here, : int(data.source_lengths[rows].max())]
        labels = targets[here, : int(data.target_lengths[rows].max())]
        loss = model(
            input_ids=input_ids, attention_mask=(input_ids != 0).long(), labels=labels.masked_fill(labels == 0, -100)
        ).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 99:
            progress.set_postfix(loss=f"{loss.item():.5f}")
    return float(loss.item())


def evaluate(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    device: torch.device,
    batch_size: int,
) -> Evaluation:
    """Counts the kana texts whose greedy output is exactly the expected romaji.

    Args:
        model: Model on the device.
        tokenizer: Its tokenizer.
        pairs: Kana texts with the expected romaji.
        device: Device of the model.
        batch_size: Texts generated at once.

    Returns:
        The counts, and every miss as (kana, expected, got).
    """
    model.train(False)
    generator: Any = model  # the library's annotations reject its own models in generate
    misses: list[tuple[str, str, str]] = []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        inputs = tokenizer([kana for kana, _ in chunk], padding=True, return_tensors="pt").to(device)
        with torch.inference_mode():
            output = generator.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=MAX_TOKENS - 1)
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        misses += [(kana, want, got) for (kana, want), got in zip(chunk, texts, strict=True) if got != want]
    return Evaluation(len(pairs) - len(misses), len(pairs), misses)


def save(model: T5ForConditionalGeneration, tokenizer: T5Tokenizer, folder: Path) -> None:
    """Writes weights, configuration and tokenizer so that they load offline and without a warning."""
    generation: Any = GenerationConfig  # untyped in the library
    model.generation_config = generation(
        max_new_tokens=MAX_TOKENS - 1, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, do_sample=False
    )
    model.save_pretrained(folder)
    # The library writes tied tensors once; readers of T5 v1.1 files expect the output layer under its own name.
    state = {name: value for name, value in model.state_dict().items() if "embed_tokens" not in name}
    weights = {name: value.detach().cpu().clone() for name, value in state.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the writer leaves it readable to its owner only
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    # transformers 5 writes true here for every T5; false is what marks a v1.1 model, whose logits are not scaled.
    config["tie_word_embeddings"] = False
    config.pop("scale_decoder_outputs", None)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    tokenizer_path = folder / "tokenizer_config.json"
    settings = json.loads(tokenizer_path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):  # how this run found the files, nothing a reader needs
        settings.pop(key, None)
    tokenizer_path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Parses the command line, trains, evaluates and writes the model folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "kana_romaji", help="folder to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--train-words", type=int, default=300_000)
    parser.add_argument("--train-sentences", type=int, default=200_000)
    parser.add_argument("--eval-words", type=int, default=2000)
    parser.add_argument("--eval-sentences", type=int, default=500)
    options = parser.parse_args()
    name = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.out.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer(options.out)
    texts = training_texts(options.train_words, options.train_sentences, options.seed)
    data = encode(tokenizer, texts)
    model = build_model(len(tokenizer), options.seed)
    torch.nn.Module.to(model, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    began = time.perf_counter()
    loss = train(model, data, options.steps, options.batch_size, options.seed)
    seconds = time.perf_counter() - began
    save(model, tokenizer, options.out)

    words, sentences = held_out_pairs(options.eval_words, options.eval_sentences, options.seed, set(texts))
    on_words = evaluate(model, tokenizer, words, device, 500)
    on_sentences = evaluate(model, tokenizer, sentences, device, 250)
    metrics: dict[str, Any] = {
        "words_exact": on_words.exact, "words_total": on_words.total, "words_accuracy": on_words.accuracy,
        "sentences_exact": on_sentences.exact, "sentences_total": on_sentences.total,
        "sentences_accuracy": on_sentences.accuracy, "parameters": parameters, "layers": model.config.num_layers,
        "steps": options.steps, "batch_size": options.batch_size, "seed": options.seed, "final_loss": loss,
        "train_words": options.train_words, "train_sentences": options.train_sentences,
        "train_seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "sentencepiece": sentencepiece.__version__,
        },
    }  # fmt: skip
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (options.out / "README.md").write_text(_README.format(**metrics), encoding="utf-8")
    for miss in [*on_words.misses[:20], *on_sentences.misses[:20]]:
        tqdm.write("missed: {} -> {} (got {})".format(*miss))
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
