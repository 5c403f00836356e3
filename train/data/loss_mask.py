"""Loss mask: which tokens are trained, under any chat template, and the proof that it is exactly those.

The text that the model must write is found in the rendered conversation (`chat.assistant_spans`). Here it becomes
tokens as at inference: prompt and answer are tokenized apart wherever a token would join the two.

    text     <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    spans                                                           [Hello<|im_end|>)
    labels   -100 ...                                              Hello <|im_end|> -100

Labels come from positions in the text and never from ids, so a pad token that is also eos is trained where it ends an
answer (trl#1623). Nothing is added to the template's text, not even BOS: a server that renders the template adds
nothing. A row that begins with two BOS tokens is refused (OpenRLHF#393).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from train.data.chat.assistant_spans import SpanFinder, TrainOn
from train.data.chat.rendering import Rendering, Tools, gaps
from train.data.chat.system_role import SystemRole, apply_system_role
from train.data.fast_tokenizer import FastTokenizer, UnsupportedTokenizerError
from train.data.sources.formats import Message, RowError
from train.data.sources.unread_text import Unread

NOT_TRAINED = -100
"""The label that PyTorch's cross entropy ignores."""

_CHECK_EVERY, _CHECKED = 100, 2_000
"""Of one text in this many both tokenizers encode this many characters, the first or the last, and are compared."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRow:
    """One training row.

    - `ids`: int32 [tokens].
    - `trained`: int32 [spans, 2], the first token and the end (exclusive) of each trained span. They ascend, and only
      those of different loss weights touch.
    - `weights`: float32 [spans], the loss weight of each span; None if all are 1.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.int32]
    weights: NDArray[np.float32] | None = None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, EncodedRow)
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self.trained, other.trained)
            and np.array_equal(self.span_weights, other.span_weights)
        )

    @property
    def span_weights(self) -> NDArray[np.float32]:
        """The loss weight of each trained span: float32 [spans]."""
        return np.ones(len(self.trained), np.float32) if self.weights is None else self.weights

    @property
    def input_ids(self) -> list[int]:
        """The token ids."""
        return self.ids.tolist()

    @property
    def labels(self) -> list[int]:
        """A label for each token: its id where it is trained, else `NOT_TRAINED`."""
        return make_labels(self.ids, self.trained).tolist()


def make_labels(ids: NDArray[np.int32], trained: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the ids within the spans `trained`, `NOT_TRAINED` elsewhere: int64 [tokens]."""
    labels = np.full(len(ids), NOT_TRAINED, np.int64)
    for start, end in trained.tolist():
        labels[start:end] = ids[start:end]
    return labels


def make_token_weights(
    tokens: int, trained: NDArray[np.int32], span_weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the loss weight of each token: float32 [tokens], 0 outside of the spans `trained`."""
    weights = np.zeros(tokens, np.float32)
    for (start, end), weight in zip(trained.tolist(), span_weights, strict=True):
        weights[start:end] = weight
    return weights


def find_runs(values: NDArray[Any]) -> NDArray[np.int32]:
    """Return the runs of equal values, except of 0 or false: int32 [runs, 2], start and end (exclusive)."""
    starts = np.flatnonzero(np.concatenate([[len(values) > 0], values[1:] != values[:-1]]))
    runs = np.stack([starts, np.append(starts, len(values))[1:]], axis=1).astype(np.int32)
    return runs[values[starts] != 0]


class Encoder:
    """Conversations -> tokens and labels, under one tokenizer and its chat template at the time of creation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, fast: bool = False) -> None:
        """Probe the template. Raises UserError if no answer can be trained under it.

        `fast`: tokenize with fastokens if it gives the same tokens; `why_not_fast` is the reason if it can't be used.
        And join rows of the template's fixed pieces where it has such.
        """
        self._tokenizer_state = _state(tokenizer)
        self._span_finder = SpanFinder(tokenizer, fast=fast)
        self.left_out: list[Unread] = []
        self._bos = tokenizer.bos_token_id
        self._added = np.asarray(sorted(tokenizer.added_tokens_decoder), dtype=np.int64)
        self._slow = None if tokenizer.is_fast else copy.copy(tokenizer)
        self._backend = _offset_backend(tokenizer) if tokenizer.is_fast else None
        self._fast: FastTokenizer | None = None
        self.why_not_fast = "" if self._backend else "it is written in Python"
        if fast and self._backend is not None:
            try:
                self._fast = FastTokenizer(tokenizer, self._backend)
            except UnsupportedTokenizerError as error:
                self.why_not_fast = str(error)

    def is_for(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return whether the tokenizer still has the template and the control tokens of this encoder."""
        return self._tokenizer_state == _state(tokenizer)

    def encode(
        self,
        conversations: Sequence[tuple[list[Message], Tools]],
        train_on: TrainOn,
        template_kwargs: Sequence[Mapping[str, Any] | None] = (),
    ) -> list[list[EncodedRow] | RowError]:
        """Return for each conversation its rows, or the error for which it can't be trained. Long lists use all cores.

        `template_kwargs`: for each conversation, the variables that it sets for the template.
        Afterwards `left_out` holds for each conversation the texts, except contents, that the template left out.
        Raises ShortcutError if fastokens or the fixed pieces turn out to give another result.
        """
        renderings: list[list[Rendering] | RowError] = []
        self.left_out = []
        for (messages, tools), kwargs in zip_longest(conversations, template_kwargs):
            missing: Unread = {}
            try:
                rendered = self._span_finder.with_variables(kwargs).rows(messages, tools, train_on)
                missing = self._span_finder.find_left_out(messages, tools, kwargs, rendered)
                renderings.append(rendered)
            except RowError as error:
                renderings.append(error)
            self.left_out.append(missing)
        encoded = iter(self._encode([row for rows in renderings if not isinstance(rows, RowError) for row in rows]))
        results: list[list[EncodedRow] | RowError] = []
        for rows in renderings:
            parts = [rows] if isinstance(rows, RowError) else list(islice(encoded, len(rows)))
            errors = [part for part in parts if isinstance(part, RowError)]
            results.append(errors[0] if errors else [part for part in parts if isinstance(part, EncodedRow)])
        return results

    def _encode(self, rows: Sequence[Rendering]) -> list[EncodedRow | RowError]:
        """Return the tokens and labels of each rendering, or its error."""
        results: list[EncodedRow | RowError | None] = [None] * len(rows)
        if self._fast is not None:
            self._fast.check(_sample(rows))
            encoded = self._fast.encode([row.text for row in rows], [row.spans for row in rows])
            results = [tokens and _make_row(*tokens, row) for row, tokens in zip(rows, encoded, strict=True)]
        rest = [row for row, result in zip(rows, results, strict=True) if result is None]
        texts = [row.text for row in rest]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False) if self._backend else [])
        for number, row in enumerate(rows):
            try:
                result = results[number] or self._label(row, next(encodings, None))
                if (
                    isinstance(result, EncodedRow)
                    and self._bos is not None
                    and result.ids[:2].tolist() == [self._bos] * 2
                ):
                    raise RowError("two BOS tokens", f"the row begins with {row.text[:40]!r}")
            except RowError as error:
                result = error
            results[number] = result
        return [result for result in results if result is not None]

    def _label(self, rendering: Rendering, encoding: Encoding | None) -> EncodedRow:
        """Return tokens and labels of one row. `encoding`: None for a slow tokenizer. Raises RowError."""
        if encoding is None:
            return self._label_slowly(rendering)
        ids = np.asarray(encoding.ids, dtype=np.int32)
        weights = self._weigh(ids, encoding, rendering)
        if weights is None:
            return self._label_in_parts(rendering)
        trained = find_runs(weights)
        return EncodedRow(ids, trained, weights[trained[:, 0]] if rendering.weights else None)

    def _weigh(self, ids: NDArray[np.int32], encoding: Encoding, rendering: Rendering) -> NDArray[np.float32] | None:
        """Return the loss weight of each token, 0 outside of the spans: float32 [tokens].

        None if a token lies across the border of a span.

        An end token may include the white space after it (Phi-3's do, by `rstrip`): it is the same token.
        Raises RowError if a span has no token.
        """
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0], offsets[:, 1]
        weights = np.zeros(len(ids), np.float32)
        for number, (start, end) in enumerate(rendering.spans):
            if ((starts < start) & (start < ends)).any():
                return None
            over_the_end = (starts < end) & (end < ends)
            if not np.isin(ids[over_the_end], self._added).all():
                return None
            inside = (starts >= start) & (ends <= end) | over_the_end & (starts >= start)
            if not inside.any():
                raise RowError("nothing to train", "no token of an answer")
            weights[inside] = rendering.weights[number] if rendering.weights else 1
        return weights

    def _label_in_parts(self, rendering: Rendering) -> EncodedRow:
        """Encode prompts and answers apart, as at inference. Raises RowError if they don't decode to the text."""
        ids: list[int] = []
        trained: list[int] = []
        for number, (before, start) in enumerate(gaps(rendering)):
            prompt = self._ids(rendering.text[before:start])
            ids += prompt
            if number < len(rendering.spans):
                answer = self._ids(rendering.text[slice(*rendering.spans[number])])
                if not answer:
                    raise RowError("nothing to train", "no token of an answer")
                trained += [len(ids), len(ids) + len(answer)]
                ids += answer
        if self._decode(ids) != rendering.text:
            raise RowError("a token joins prompt and answer", "and this tokenizer can't encode the two apart exactly")
        return _make_row(np.asarray(ids, np.int32), np.asarray(trained, np.int32).reshape(-1, 2), rendering)

    def _label_slowly(self, rendering: Rendering) -> EncodedRow:
        """Encode without offsets: the tokens up to a border, encoded alone, must be those that the row begins with.

        If they aren't, a token may lie across the border, and the parts are encoded apart.
        """
        ids = self._ids(rendering.text)
        trained: list[int] = []
        for start, end in rendering.spans:
            before, up_to = self._ids(rendering.text[:start]), self._ids(rendering.text[:end])
            if len(before) >= len(up_to) or ids[: len(up_to)] != up_to or up_to[: len(before)] != before:
                return self._label_in_parts(rendering)
            trained += [len(before), len(up_to)]
        return _make_row(np.asarray(ids, np.int32), np.asarray(trained, np.int32).reshape(-1, 2), rendering)

    def _ids(self, text: str) -> list[int]:
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return list(self._slow.encode(text, add_special_tokens=False)) if self._slow is not None else []

    def _decode(self, ids: list[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        if self._slow is None:
            return ""
        return str(self._slow.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _sample(rows: Sequence[Rendering]) -> list[str]:
    """Return the parts of rows that both tokenizers encode."""
    texts = [row.text for row in rows[::_CHECK_EVERY]]
    return [text[-_CHECKED:] if number % 2 else text[:_CHECKED] for number, text in enumerate(texts)]


def _make_row(ids: NDArray[np.int32], spans: NDArray[np.int32], rendering: Rendering) -> EncodedRow:
    """Return a row of which these spans of tokens, those of the rendering, are trained; merge the touching ones."""
    weights = np.asarray(rendering.weights, np.float32) if rendering.weights else None
    if len(spans) == 1:
        return EncodedRow(ids, spans, weights)
    touching = spans[1:, 0] == spans[:-1, 1]
    if weights is not None:
        touching &= weights[1:] == weights[:-1]
    merged = np.flatnonzero(touching)
    if len(merged):
        spans = np.stack([np.delete(spans[:, 0], merged + 1), np.delete(spans[:, 1], merged)], axis=1)
        weights = None if weights is None else np.delete(weights, merged)
    return EncodedRow(ids, spans, weights)


def _state(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    return tokenizer.chat_template, dict(tokenizer.special_tokens_map), len(tokenizer)


def _offset_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the tokenizer's backend without post-processing, truncation and padding.

    A post-processor would add special tokens that the template has written already, and byte-level ones trim leading
    spaces from the offsets.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, Encoder] = WeakKeyDictionary()
"""The encoders of `encode`, each kept while its tokenizer lives: a template is probed once, not for every row."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    train_on: TrainOn = "assistant",
    system_role: SystemRole = "native",
    tools: Tools = None,
) -> list[EncodedRow]:
    """Return token ids and labels of one conversation under the tokenizer's chat template.

    There is one row, or several where the template rewrites earlier turns (see `train.data.chat.assistant_spans`).

    - `train_on`: every assistant turn, or the last one only; its end token is trained with it.
    - `system_role`: see `train.data.chat.system_role`; the tokenizer's template stays unchanged.

    Raises RowError if this conversation can't be trained, UserError if no conversation can.
    """
    if system_role != "native":
        tokenizer = copy.copy(tokenizer)
        apply_system_role(tokenizer, system_role)
    encoder = _encoders.get(tokenizer)
    if encoder is None or not encoder.is_for(tokenizer):
        encoder = _encoders[tokenizer] = Encoder(tokenizer)
    (result,) = encoder.encode([(messages, tools)], train_on)
    if isinstance(result, RowError):
        raise result
    return result
