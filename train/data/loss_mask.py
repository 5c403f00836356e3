"""Which tokens are trained, under any chat template, and the proof that they are just those.

What the model must write is found as text (`spans`); here it becomes tokens, as they will be at inference: what the
model is given is tokenized apart from what it writes wherever a token would join the two. Labels come from places in
the text and never from ids, so that a pad token that is also eos is trained where it ends an answer (trl#1623).

Nothing is added to the template's text, BOS neither: a server that renders the template adds none. A row that begins
with two is refused (OpenRLHF#393).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from train.data.formats import Message, RowFault
from train.data.rendering import Rendering, Span, Tools, gaps
from train.data.spans import Spans, TrainOn
from train.data.system_role import SystemRole, settle

NOT_TRAINED = -100
"""The label that PyTorch's cross entropy ignores."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training row: token ids, and as long a list of labels, `NOT_TRAINED` where nothing is learnt."""

    input_ids: list[int]
    labels: list[int]


class Encoder:
    """Conversations -> rows of tokens and labels, under one tokenizer and the chat template that it has when made."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Learn what the template does. Raises UserError where no answer can be trained under it."""
        self._made_for = _state(tokenizer)
        self._spans = Spans(tokenizer)
        self._bos = tokenizer.bos_token_id
        self._added = np.asarray(sorted(tokenizer.added_tokens_decoder), dtype=np.int64)
        self._slow = None if tokenizer.is_fast else copy.copy(tokenizer)
        self._backend = _offset_backend(tokenizer) if tokenizer.is_fast else None

    def is_for(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the tokenizer has still the template and the control tokens that were learnt."""
        return self._made_for == _state(tokenizer)

    def encode(
        self, conversations: Sequence[tuple[list[Message], Tools]], train_on: TrainOn
    ) -> list[list[Encoded] | RowFault]:
        """For each conversation its rows, or the fault that keeps it from being trained. One call uses all cores."""
        renderings: list[list[Rendering] | RowFault] = []
        for messages, tools in conversations:
            try:
                renderings.append(self._spans.rows(messages, tools, train_on))
            except RowFault as fault:
                renderings.append(fault)
        texts = [row.text for rows in renderings if not isinstance(rows, RowFault) for row in rows]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False) if self._backend else [])
        results: list[list[Encoded] | RowFault] = []
        for rows in renderings:
            if isinstance(rows, RowFault):
                results.append(rows)
                continue
            pairs = [(row, next(encodings, None)) for row in rows]
            try:
                results.append([self._label(row, encoding) for row, encoding in pairs])
            except RowFault as fault:
                results.append(fault)
        return results

    def _label(self, rendering: Rendering, encoding: Encoding | None) -> Encoded:
        """Labels for one row; `encoding` is None for a slow tokenizer. Raises RowFault."""
        if encoding is None:
            encoded = self._label_slowly(rendering)
        else:
            ids = np.asarray(encoding.ids, dtype=np.int64)
            trained = self._trained(ids, encoding, rendering.spans)
            if trained is None:
                encoded = self._label_in_parts(rendering)
            else:
                encoded = Encoded(ids.tolist(), np.where(trained, ids, NOT_TRAINED).tolist())
        if self._bos is not None and encoded.input_ids[:2] == [self._bos] * 2:
            raise RowFault("two BOS tokens", f"the row begins with {rendering.text[:40]!r}")
        return encoded

    def _trained(self, ids: NDArray[np.int64], encoding: Encoding, spans: list[Span]) -> NDArray[np.bool_] | None:
        """Which of the tokens lie in a span; None where one lies across a border, so that tokens can't tell.

        An end token may take the blanks after it (Phi-3's do, by `rstrip`): it is no other token for that.
        Raises RowFault where a span has no token.
        """
        places = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        starts, ends = places[:, 0], places[:, 1]
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            if ((starts < start) & (start < ends)).any():
                return None
            over_the_end = (starts < end) & (end < ends)
            if not np.isin(ids[over_the_end], self._added).all():
                return None
            inside = (starts >= start) & (ends <= end) | over_the_end & (starts >= start)
            if not inside.any():
                raise RowFault("nothing to train", "no token of an answer")
            trained |= inside
        return trained

    def _label_in_parts(self, rendering: Rendering) -> Encoded:
        """Prompts and answers encoded apart, as they will be at inference. Raises RowFault where that isn't exact."""
        ids: list[int] = []
        labels: list[int] = []
        for number, (before, start) in enumerate(gaps(rendering)):
            prompt = self._ids(rendering.text[before:start])
            ids += prompt
            labels += [NOT_TRAINED] * len(prompt)
            if number < len(rendering.spans):
                answer = self._ids(rendering.text[slice(*rendering.spans[number])])
                if not answer:
                    raise RowFault("nothing to train", "no token of an answer")
                ids += answer
                labels += answer
        if self._decode(ids) != rendering.text:
            raise RowFault("a token joins prompt and answer", "and this tokenizer can't encode the two apart exactly")
        return Encoded(ids, labels)

    def _label_slowly(self, rendering: Rendering) -> Encoded:
        """Labels without offsets: the text up to a border, encoded alone, must be what the whole begins with.

        Where it isn't, a token lies across the border or may do so, and the parts are encoded apart.
        """
        ids = self._ids(rendering.text)
        labels = [NOT_TRAINED] * len(ids)
        for start, end in rendering.spans:
            before, up_to = self._ids(rendering.text[:start]), self._ids(rendering.text[:end])
            if len(before) >= len(up_to) or ids[: len(up_to)] != up_to or up_to[: len(before)] != before:
                return self._label_in_parts(rendering)
            labels[len(before) : len(up_to)] = up_to[len(before) :]
        return Encoded(ids, labels)

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


def _state(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    return tokenizer.chat_template, dict(tokenizer.special_tokens_map), len(tokenizer)


def _offset_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's backend that adds nothing, cuts nothing and tells each token's whole place in the text.

    A post-processor would add special tokens that the template has written already, and byte-level ones trim leading
    blanks from the offsets.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, Encoder] = WeakKeyDictionary()
"""What `encode` has learnt, for as long as the tokenizer lives: templates are probed once, not at every row."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    train_on: TrainOn = "assistant",
    system_role: SystemRole = "native",
    tools: Tools = None,
) -> list[Encoded]:
    """Token ids and labels of one conversation under the tokenizer's own chat template.

    One row, or several where the template rewrites earlier turns (see `spans`). `train_on`: every assistant turn, or
    the last one only; its end token is trained with it. `system_role`: see `train.data.system_role`; the tokenizer's
    template stays as it is.
    Raises RowFault where this conversation can't be trained, UserError where the tokenizer or template can't be.
    """
    if system_role != "native":
        tokenizer = copy.copy(tokenizer)
        settle(tokenizer, system_role)
    encoder = _encoders.get(tokenizer)
    if encoder is None or not encoder.is_for(tokenizer):
        encoder = _encoders[tokenizer] = Encoder(tokenizer)
    (result,) = encoder.encode([(messages, tools)], train_on)
    if isinstance(result, RowFault):
        raise result
    return result
