"""fastokens in place of the tokenizer, where it provably gives the same ids, and the position of each token.

The package fastokens tokenizes many times faster than the Hugging Face tokenizer whose file it reads. But it gives no
offsets, and as another program it is not guaranteed to agree. So

- it must agree on texts that are known to be hard, before any row is encoded;
- it must agree on a sample of the user's own rows, throughout the run (`check`);
- the bytes of a row's tokens, joined, must spell the row: then the sum of their lengths is their position. Other rows
  (of a tokenizer that normalizes or strips something) are left to the tokenizer itself. Byte-level BPE keeps every byte
  that it has a token for, of a text that it doesn't normalize, except spaces that an added token strips; there the sum
  alone decides.
"""

import json
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import fastokens
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from train.data.chat.rendering import ShortcutError, Span

_UNSPELLABLE = b"\xff"
"""The bytes of a token without text: not valid in UTF-8, so a row with it never agrees."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"
_HARD_TEXTS = (
    "",
    " ",
    "\n\n\n  \t x",
    "plain words, and a number: 1234567890 12 3.14159",
    "it's they'LL WE'D don’t 'tis",
    "naïve café cafe\u0301 Å A\u030a ﬁ Ⅷ ½ ²",
    "日本語のテキスト。한국어 텍스트 中文文本，標點",
    "العربية עברית हिन्दी ไทย русский",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "zero\u200bwidth\u200d joiner\u00a0space\u2003em\u3000wide\ufeffmark",
    "def f(x):\n\treturn {'a': [1,2], \"b\": x**2}  # comment\r\n",
    "https://example.org/a_b?c=d&e=%20 name@example.org <b>bold</b>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "----------======== ........ !!!!!!!! ????",
    "▁ ▁▁ Ġ Ċ ## <0x0A> <unk> [INST] </s>",
    "\x01\x02\x7f\x85",
)


class UnsupportedTokenizerError(Exception):
    """fastokens can't be used for a tokenizer, for the reason in the message."""


class FastTokenizer:
    """The fast replacement of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> None:
        """`backend`: the tokenizer's backend without post-processing. Raises UnsupportedTokenizerError."""
        file = backend.to_str()
        description = json.loads(file)
        pieces = _pieces(tokenizer, description)
        if pieces is None:
            raise UnsupportedTokenizerError("its tokens are of a kind whose bytes aren't known")
        self._pieces = pieces
        self._sizes = np.fromiter(map(len, pieces), np.int32, len(pieces))
        self._backend = backend
        added = sorted((token["content"] for token in description["added_tokens"]), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, added)) or '(?!)'})")
        normalizers = [part["type"] for part in _parts(description["normalizer"])]
        byte_level = any(part["type"] == "ByteLevel" for part in _parts(description["pre_tokenizer"]))
        self._keeps_bytes = byte_level and set(normalizers) <= {"NFC"}
        vocabulary = tokenizer.get_vocab()
        self._known_bytes = bytes(byte for byte, character in bytes_to_unicode().items() if character in vocabulary)
        self._normalizes = bool(normalizers)
        self._prepends = _SPACE in {part.get("prepend") for part in _parts(description["normalizer"])}
        try:
            self._fast = fastokens.Tokenizer.from_json_str(file)
            self.check([text + token + text for text in _HARD_TEXTS for token in ["", *added[:4]]])
        except ShortcutError as error:
            raise UnsupportedTokenizerError(str(error)) from error
        except BaseException as error:  # any error for an unknown tokenizer, a Rust panic included
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UnsupportedTokenizerError(f"fastokens refuses it: {' '.join(str(error).split())[:100]}") from error

    def encode(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]] | None]:
        """Return the tokens of each text, int32 [tokens], and those of its spans of characters, int32 [spans, 2].

        A span is its first token and its end (exclusive). None where the tokenizer itself is needed: the tokens don't
        spell the text, a token lies across the border of a span, or a span has no token.
        """
        if not texts:
            return []
        encoded = self._encode_flat(texts)
        if encoded is None:  # one text is enough, with a character that has no token
            if len(texts) == 1:
                return [None]
            return [self.encode([text], [of_text])[0] for text, of_text in zip(texts, spans, strict=True)]
        ids, offsets = encoded
        starts, ends = offsets[:-1], offsets[1:]
        position = np.append(
            0, np.cumsum(self._sizes.take(ids), dtype=np.int64)
        )  # in bytes of all texts, of each token
        sizes = position[ends] - position[starts]
        columns = (column.tolist() for column in (starts, ends, position[starts], sizes))
        rows = zip(texts, spans, *columns, strict=True)
        borders = [
            self._borders(text, of_text, ids[start:end], at, size) for text, of_text, start, end, at, size in rows
        ]
        flat = np.asarray([border for of_text in borders for border in of_text or ()], np.int64)
        tokens = np.searchsorted(position, flat)
        exact = (position[np.minimum(tokens, len(position) - 1)] == flat).reshape(-1, 2).all(axis=1)
        within = tokens.reshape(-1, 2)
        good = exact & (within[:, 0] < within[:, 1])
        results: list[tuple[NDArray[np.int32], NDArray[np.int32]] | None] = []
        first = 0
        for of_text, start, end in zip(borders, starts.tolist(), ends.tolist(), strict=True):
            last = first + len(of_text or ()) // 2
            fits = of_text is not None and bool(good[first:last].all())
            results.append((ids[start:end], (within[first:last] - start).astype(np.int32)) if fits else None)
            first = last
        return results

    def check(self, texts: Iterable[str]) -> None:
        """Compare the ids of texts with those of the tokenizer. Raises ShortcutError."""
        for text in texts:
            encoded = self._encode_flat([text])
            if encoded and encoded[0].tolist() != self._backend.encode(text, add_special_tokens=False).ids:
                raise ShortcutError(f"fastokens gives other tokens for {text[:60]!r}")

    def _encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
        """Return the ids of all texts, [tokens], and their offsets, [texts + 1]; None if fastokens fails."""
        try:
            ids, offsets = self._fast.encode_batch_flat(list(texts))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return None
        return np.frombuffer(ids, np.uint32).astype(np.int32), np.frombuffer(offsets, np.uint64).astype(np.int64)

    def _borders(
        self, text: str, spans: Sequence[Span], ids: NDArray[np.int32], start: int, size: int
    ) -> list[int] | None:
        """Return the borders of spans in bytes, counted from `start`; None if the tokens don't spell the text.

        `size`: the bytes of the tokens `ids`.
        """
        inserted: list[int] = []
        if self._keeps_bytes and (not self._normalizes or unicodedata.is_normalized("NFC", text)):
            data = text.encode("utf-8", "surrogatepass")
            if len(data) != size or data.translate(None, self._known_bytes):
                return None
        else:
            spelled, inserted = self._spell(text)
            if b"".join(map(self._pieces.__getitem__, ids.tolist())) != spelled.encode("utf-8", "surrogatepass"):
                return None
        borders = [border for span in spans for border in span]
        if not text.isascii():
            parts = (text[before:border] for before, border in pairwise([0, *borders]))
            borders = [*accumulate(len(part.encode("utf-8", "surrogatepass")) for part in parts)]
        if inserted:
            characters = [border for span in spans for border in span]
            borders = [border + bisect_left(inserted, at) for border, at in zip(borders, characters, strict=True)]
        return [start + border for border in borders]

    def _spell(self, text: str) -> tuple[str, list[int]]:
        """Return the text with the spaces that the tokenizer prepends, and their positions in `text`."""
        if not self._prepends:
            return text, []
        parts: list[str] = []
        inserted: list[int] = []
        position = 0
        for number, part in enumerate(self._added.split(text)):
            if number % 2 == 0 and part:
                parts.append(" ")
                inserted.append(position)
            parts.append(part)
            position += len(part)
        return "".join(parts), inserted


def _pieces(tokenizer: PreTrainedTokenizerBase, description: dict[str, Any]) -> list[bytes] | None:
    """Return the bytes that each token spells, by id; None for another kind of tokenizer."""
    steps = [*_parts(description["pre_tokenizer"]), *_parts(description["normalizer"])]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

        def spell(token: str) -> bytes:
            return bytes(byte_of.get(character, 0xFF) for character in token)

    elif "Metaspace" in kinds or any(step.get("content") == _SPACE for step in steps):

        def spell(token: str) -> bytes:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode("utf-8", "surrogatepass")

    else:
        return None
    pieces = [_UNSPELLABLE] * len(tokenizer)
    for token, number in tokenizer.get_vocab().items():
        if number >= len(pieces):
            return None
        pieces[number] = spell(token) or _UNSPELLABLE
    for token in description["added_tokens"]:
        pieces[token["id"]] = token["content"].encode() or _UNSPELLABLE
    return pieces


def _parts(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield a normalizer or pre-tokenizer and all its parts."""
    if step is not None:
        yield step
        for part in step.get("normalizers", step.get("pretokenizers", [])):
            yield from _parts(part)
