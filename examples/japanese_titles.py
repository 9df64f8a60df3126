"""Titles and summaries of Japanese texts, with any T5 checkpoint that was fine-tuned for them.

    python examples/japanese_titles.py sonoisa/t5-base-japanese-title-generation --normalize nfkc --lower --file news.txt
    python examples/japanese_titles.py my-fine-tuned-folder --task summary --prefix "要約: " --whole < article.txt
    echo "がっこうへ いきます。" | python examples/japanese_titles.py        # the shipped model, which transliterates

One text a line, or with --whole the whole input as one text. What the checkpoints want:

- sonoisa/t5-base-japanese-title-generation is fine-tuned for titles. Public code for it adds no prefix, cuts sources at
  512 tokens, and normalizes text with the rules of NEologd and to lower case; --normalize nfkc --lower comes close to
  that. For exactly those rules pass the text through the package neologdn first.
- sonoisa/t5-base-japanese and megagonlabs/t5-base-japanese-web are pre-trained only: fine-tune them for the task (see
  fine_tuned.py), then give the folder here, with the prefix and the normalization that the training used.
- Where a checkpoint brings only spiece.model, the tokenizer needs the package sentencepiece.

CI has no hub, so it runs the shipped model: that shows that the script works, not what such checkpoints write.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from pathlib import Path

from transformers import AutoTokenizer

from t5_trt import TRTT5ForConditionalGeneration, generate_many

SHIPPED = Path(__file__).resolve().parent / "kana_romaji"
NEW_TOKENS = {"title": 64, "summary": 128}


def read_texts(file: Path | None, whole: bool) -> list[str]:
    """The texts of a file or of standard input."""
    content = file.read_text(encoding="utf-8") if file else sys.stdin.read()
    texts = [" ".join(content.splitlines())] if whole else content.splitlines()
    return [text.strip() for text in texts if text.strip()]


def prepare(text: str, normalize: str, lower: bool, prefix: str) -> str:
    """The text as the checkpoint saw texts in its training."""
    if normalize == "nfkc":
        text = " ".join(unicodedata.normalize("NFKC", text).split())
    return prefix + (text.lower() if lower else text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED), help="folder or hub id of a fine-tuned checkpoint")
    parser.add_argument("--task", choices=sorted(NEW_TOKENS), default="title", help="sets the default length")
    parser.add_argument("--file", type=Path, help="texts; default: standard input")
    parser.add_argument("--whole", action="store_true", help="the input is one text of several lines")
    parser.add_argument("--normalize", choices=["none", "nfkc"], default="none")
    parser.add_argument("--lower", action="store_true", help="lower case, after normalization")
    parser.add_argument("--prefix", default="", help='put before each text, such as "要約: "')
    parser.add_argument("--source-tokens", type=int, default=512, help="longer texts are cut")
    parser.add_argument("--max-new-tokens", type=int, help=f"default: {NEW_TOKENS}")
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=1, help="results for each text, at most --num-beams")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="above 1 prefers longer results")
    parser.add_argument("--no-repeat-ngram", type=int, default=0, help="size of groups of tokens that may not repeat")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    if options.candidates > options.num_beams:
        parser.error("--candidates is larger than --num-beams")

    texts = read_texts(options.file, options.whole)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = TRTT5ForConditionalGeneration.from_pretrained(options.model)
    results = generate_many(
        model,
        tokenizer,
        [prepare(text, options.normalize, options.lower, options.prefix) for text in texts],
        batch_size=options.batch_size,
        max_source_tokens=options.source_tokens,
        num_beams=options.num_beams,
        num_return_sequences=options.candidates,
        max_new_tokens=options.max_new_tokens or NEW_TOKENS[options.task],
        no_repeat_ngram_size=options.no_repeat_ngram,
        length_penalty=options.length_penalty,
    )
    for result in results:
        print("\t".join([result] if isinstance(result, str) else result), flush=True)


if __name__ == "__main__":
    main()
