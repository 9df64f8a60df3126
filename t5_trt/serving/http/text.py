"""Tokens to text as they come, in pieces that stay as they are: together they are the text of all tokens."""

from __future__ import annotations

import re
from typing import Any

#: tokens that are decoded again for each new one, at most and after being cut
_WINDOW, _KEPT = 64, 16
_CLEANED = 4  # characters of the longest that Transformers' clean-up takes a space from
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """Decodes for one model.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        bytes_ = [token for name, token in tokenizer.get_vocab().items() if _BYTE.fullmatch(name)]
        #: after which bytes may go on: special ones are left out of the text
        self.open_tokens = frozenset([*bytes_, *tokenizer.all_special_ids])
        #: Transformers then takes spaces out before some characters, which come later
        self.cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))

    def text(self, tokens: list[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class TextStream:
    """The text of one sequence.

    A character may need several tokens (bytes, parts of a character), and the bytes of a run are decoded together: what more tokens could
    change waits for them.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tokens: list[int] = []
        self._start = 0  # of the window of tokens that is decoded
        self._shown = 0  # characters of the window's text that were given out
        self._given = 0  # characters of all of it

    def push(self, tokens: list[int]) -> str:
        """Add tokens.

        Returns:
            More text, or none yet.
        """
        self._tokens += tokens
        count = len(self._tokens)
        while count > self._start and self._tokens[count - 1] in self._decoder.open_tokens:
            count -= 1
        text = self._decoder.text(self._tokens[self._start : count])
        end = len(text.rstrip(_UNFINISHED))
        if self._decoder.cleans_up and (space := text.rfind(" ")) >= len(text) - _CLEANED:
            end = min(end, max(space, 0))
        if end <= self._shown:
            return ""
        piece, self._shown = text[self._shown : end], end
        self._given += len(piece)
        if count - self._start > _WINDOW and end == len(text):
            self._cut(text, count - _KEPT, count)
        return piece

    def finish(self) -> str:
        """The rest of the text, once all tokens are there."""
        return self._decoder.text(self._tokens)[self._given :]

    def _cut(self, text: str, start: int, end: int) -> None:
        """Begin the window later, where the text from there on is the same."""
        rest = self._decoder.text(self._tokens[start:end])
        if rest and text.endswith(rest):
            self._start, self._shown = start, len(rest)
