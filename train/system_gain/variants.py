"""Conversations as system gain needs them: each under its own system message, under others, and under none.

The answers stay as they are; only the system message that a conversation begins with is another one, or is left out.
What is said in the user's and the tools' turns is the instruction; conversations that share it (and the tools) are
siblings. The other messages are those of the siblings, as Multifaceted Collection has them, where there are any; else
they are drawn by the seed from other rows. No message is another's equal, blanks at the ends aside.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from train.data.loss_mask import EncodedRow
from train.data.sources.formats import Conversation, Message, RawRow, RowError, read_row
from train.data.sources.source import chunks_and_format, open_source
from train.data.tokens.workers import RowTokenizer
from train.recipe import Source

Label = tuple[str, str]
"""What a figure can be told apart by, and the value of it: ("rule", "bullet_points")."""

LABEL_COLUMNS = ("main_source", "original_source", "source", "rule", "held_out")
"""Columns whose text is a label; those that the row has none of, or no text in, give none."""

_AT_A_TIME = 512
"""Conversations tokenized in one go: the tokenizer uses all cores, and the texts don't pile up."""


@dataclass(frozen=True, slots=True)
class LabelledConversation:
    """A conversation, and what the data says that it belongs to."""

    conversation: Conversation
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True, slots=True)
class Variants:
    """One row's answers under several system messages, tokenized.

    `own`, each of `others` and `none`: mostly one piece each; several where the template rewrites earlier turns.
    `instruction`: the number that siblings share. `siblings`: whether `others` are theirs.
    """

    place: str
    instruction: int
    labels: tuple[Label, ...]
    own: list[EncodedRow]
    others: list[list[EncodedRow]]
    none: list[EncodedRow]
    siblings: bool

    @property
    def all(self) -> list[list[EncodedRow]]:
        """Under its own message, under the others, under none."""
        return [self.own, *self.others, self.none]

    @property
    def tokens(self) -> int:
        """How many tokens of the answers are trained, under the row's own message."""
        return sum(trained_tokens(piece) for piece in self.own)

    @property
    def same_answer(self) -> bool:
        """Whether the answers are the same tokens under every message; a token at a template's border may differ."""
        answers = [np.concatenate([answer_ids(piece) for piece in pieces]) for pieces in self.all]
        return all(np.array_equal(answers[0], answer) for answer in answers[1:])


@dataclass(frozen=True, slots=True)
class VariantRows:
    """The rows that can be measured, and why the others can't: kind of fault -> how many, and the first of each."""

    rows: list[Variants]
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave_out(self, place: str, kind: str, detail: str = "") -> None:
        """Count one more."""
        self.left_out[kind] += 1
        self.examples.setdefault(kind, f"{place}: {detail}" if detail else place)


def trained_tokens(piece: EncodedRow) -> int:
    """How many of its tokens are learnt."""
    return int((piece.trained[:, 1] - piece.trained[:, 0]).sum())


def answer_ids(piece: EncodedRow) -> np.ndarray:
    """The tokens that are learnt."""
    return np.concatenate([piece.ids[start:end] for start, end in piece.trained.tolist()] or [piece.ids[:0]])


def read_labelled_conversations(
    sources: Sequence[Source],
    columns: Iterable[str] = (),
    *,
    places: Container[str] | None = None,
    allow_pickle: bool = False,
) -> list[LabelledConversation | tuple[str, RowError]]:
    """Every row of `sources` with its labels, or the place and fault of one that is no conversation.

    `columns`: further columns whose text is a label. Of several sources each is a label too. `places`: take the rows
    that stand there alone. Raises UserError.
    """
    rows: list[LabelledConversation | tuple[str, RowError]] = []
    columns = (*LABEL_COLUMNS, *columns)
    for source in sources:
        opened = open_source(source, allow_pickle)
        of_source: tuple[Label, ...] = (("data", source.path),) if len(sources) > 1 else ()
        chunks, format = chunks_and_format(source, opened)
        for number, chunk in chunks:
            for place, row in chunk.rows():
                whole_place = opened.files[number] + place
                if places is not None and whole_place not in places:
                    continue
                try:
                    if isinstance(row, RowError):
                        raise row
                    conversation = read_row(row, format, whole_place, ignore=source.ignore)
                    rows.append(LabelledConversation(conversation, of_source + labels_of(row, columns)))
                except RowError as fault:
                    rows.append((whole_place, fault))
    return rows


def labels_of(row: RawRow, columns: Iterable[str] = LABEL_COLUMNS) -> tuple[Label, ...]:
    """What the columns of a row say that it belongs to; of a Janus row also the dimensions of its preference set.

    A label of a dimension is ("style", "conciseness"): its sub-dimension. What isn't as expected gives no label.
    """
    labels = [(column, row[column]) for column in columns if isinstance(row.get(column), str) and row[column]]
    preferences = row.get("preference_set")
    if isinstance(preferences, str):
        try:
            preferences = json.loads(preferences)
        except ValueError:
            preferences = None
    for preference in preferences if isinstance(preferences, list | tuple) else ():
        if isinstance(preference, Mapping):
            pair = preference.get("dimension"), preference.get("subdimension")
            if isinstance(pair[0], str) and isinstance(pair[1], str):
                labels.append((pair[0], pair[1]))
    return tuple(dict.fromkeys(labels))


@dataclass(frozen=True, slots=True)
class Chosen:
    """A row that is to be measured, and the other messages that its answers are to be scored under.

    `instruction`, `siblings`: as of `Variants`.
    """

    row: LabelledConversation
    instruction: int
    others: list[str]
    siblings: bool


def make_variants(
    rows: Sequence[LabelledConversation | tuple[str, RowError]],
    tokenizer: RowTokenizer,
    *,
    others: int = 2,
    limit: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> VariantRows:
    """Each row under its own system message, up to `others` others, and none.

    `limit`: at most so many rows, drawn by the seed; messages are still taken from all. `max_length`: a row that has
    more tokens under any of its messages is left out. Rows without a system message, those that can't be tokenized as
    they would be for training, and those for which there is no other message are left out and counted.
    """
    made = VariantRows([])
    encode(choose(rows, made, others=others, limit=limit, seed=seed), tokenizer, made, max_length=max_length)
    return made


def choose(
    rows: Sequence[LabelledConversation | tuple[str, RowError]],
    made: VariantRows,
    *,
    others: int = 2,
    limit: int | None = None,
    seed: int = 0,
) -> list[Chosen]:
    """The rows to measure, with others' messages; `made` counts those that are left out."""
    asked: list[tuple[LabelledConversation, int]] = []
    siblings: dict[int, list[str]] = defaultdict(list)
    numbers: dict[str, int] = {}
    for row in rows:
        if not isinstance(row, LabelledConversation):
            made.leave_out(row[0], row[1].kind, row[1].detail)
            continue
        system, _ = split_system(row.conversation.messages)
        if not system:
            made.leave_out(row.conversation.place, "no system message")
            continue
        number = numbers.setdefault(_instruction(row.conversation), len(numbers))
        siblings[number].append(system)
        asked.append((row, number))
    messages = {number: list(dict.fromkeys(texts)) for number, texts in siblings.items()}
    everyone = list(dict.fromkeys(text for texts in messages.values() for text in texts))
    places = range(len(asked))
    if limit is not None and limit < len(asked):
        places = sorted(random.Random(f"limit {seed}").sample(range(len(asked)), limit))  # type: ignore[assignment]
    chosen: list[Chosen] = []
    for place in places:
        row, number = asked[place]
        own, _ = split_system(row.conversation.messages)
        chance = random.Random(f"{seed} {place}")  # of its own: the same whatever other rows are asked
        of_siblings = [text for text in messages[number] if text != own]
        found = chance.sample(of_siblings, min(others, len(of_siblings))) or _drawn(everyone, own, others, chance)
        if not found:
            made.leave_out(row.conversation.place, "no other system message in the data")
            continue
        chosen.append(Chosen(row, number, found, bool(of_siblings)))
    return chosen


def encode(
    chosen: Sequence[Chosen], tokenizer: RowTokenizer, made: VariantRows, *, max_length: int | None = None
) -> None:
    """Tokenize the rows and add them to `made`, which counts those that are left out."""
    for start in range(0, len(chosen), _AT_A_TIME):
        _encode(chosen[start : start + _AT_A_TIME], tokenizer, max_length, made)


def split_system(messages: list[Message]) -> tuple[str, list[Message]]:
    """The system message that a conversation begins with (several in a row joined by a blank line), and the rest."""
    first = next((number for number, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return "\n\n".join(message["content"] for message in messages[:first]).strip(), messages[first:]


def _instruction(conversation: Conversation) -> str:
    """What siblings have in common: the tools, and all turns but the answers and the system message at the start."""
    _, rest = split_system(conversation.messages)
    said = [(message["role"], message["content"]) for message in rest if message["role"] != "assistant"]
    return json.dumps([said, conversation.tools], sort_keys=True, default=str)


def _drawn(everyone: list[str], own: str, count: int, chance: random.Random) -> list[str]:
    """Up to `count` messages of `everyone` (no two are equal) that aren't `own`."""
    drawn = chance.sample(range(len(everyone)), min(count + 1, len(everyone)))
    return [everyone[place] for place in drawn if everyone[place] != own][:count]


def _encode(rows: Sequence[Chosen], tokenizer: RowTokenizer, max_length: int | None, made: VariantRows) -> None:
    conversations: list[Conversation] = []
    for chosen in rows:
        own = chosen.row.conversation
        _, rest = split_system(own.messages)
        heads: list[list[Message]] = [[{"role": "system", "content": text}] for text in chosen.others]
        conversations += [own, *(replace(own, messages=head + rest) for head in heads), replace(own, messages=rest)]
    encoded = iter(tokenizer.encode(conversations))
    for chosen in rows:
        place = chosen.row.conversation.place
        results: list[Any] = [next(encoded) for _ in range(len(chosen.others) + 2)]
        fault = next((result for result in results if isinstance(result, RowError)), None)
        if fault is not None:
            made.leave_out(place, fault.kind, fault.detail)
            continue
        longest = max(len(piece.ids) for pieces in results for piece in pieces)
        if max_length is not None and longest > max_length:
            made.leave_out(place, f"more than {max_length:,} tokens", f"{longest:,}")
            continue
        own_pieces, *others, none = results
        made.rows.append(
            Variants(place, chosen.instruction, chosen.row.labels, own_pieces, others, none, chosen.siblings)
        )
