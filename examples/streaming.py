"""Text that appears while it is made: TextStreamer on the terminal, then TextIteratorStreamer from a thread.

    python examples/streaming.py
    python examples/streaming.py MODEL --text "文章" --max-new-tokens 128

Streamers are Transformers' own, with greedy search or sampling (--sample); Transformers has none for beams. They hand
out Japanese character by character, and romaji token by token (word by word before Transformers 5.24).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, TextIteratorStreamer, TextStreamer

from t5_trt import TRTT5ForConditionalGeneration

SHIPPED = Path(__file__).resolve().parent / "kana_romaji"


def pieces(model: Any, tokenizer: Any, text: str, **arguments: Any) -> Iterator[str]:
    """Pieces of the result, as a web server would send them; generation runs in a thread beside the caller."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def end_after_error(done: Future[Any]) -> None:
        if done.exception() is not None:  # the loop below would wait forever
            streamer.end()

    batch = tokenizer([text], return_tensors="pt").to(model.device)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(model.generate, **batch, **arguments, streamer=streamer)
        future.add_done_callback(end_after_error)
        yield from streamer
        future.result()  # raises what went wrong in the thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED), help="folder or hub id of a T5 checkpoint")
    parser.add_argument("--text", default="あした ともだちと えいがを みに いきます。")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the most likely ones")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = TRTT5ForConditionalGeneration.from_pretrained(options.model)
    arguments = {"max_new_tokens": options.max_new_tokens, "do_sample": options.sample}

    print("TextStreamer:")
    batch = tokenizer([options.text], return_tensors="pt").to(model.device)
    # skip_prompt: the decoder's start token is the prompt
    model.generate(**batch, **arguments, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))

    print("TextIteratorStreamer:")
    for piece in pieces(model, tokenizer, options.text, **arguments):
        if piece:
            print(f"[{piece}]", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
