"""Variants of conversations for system gain: under their own system message, under others, and under none.

Only the leading system message changes; the answers stay. The turns of user and tools are the instruction, and
conversations with the same instruction (and tools) are siblings. The other messages are those of the siblings, as in
Multifaceted Collection, if there are any, else messages of other rows drawn by the seed. All messages of a row differ,
apart from white space at their ends.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from train.data.loss_mask import EncodedRow
from train.data.sources.formats import Conversation, Message, RawRow, RowError, detect, read_row
from train.data.sources.pairs import PREFERENCE, detect_with_pairs, read_pair
from train.data.sources.source import chunks_and_format, open_source
from train.data.tokens.workers import RowTokenizer
from train.recipe import Source

Label = tuple[str, str]
"""A property that figures are grouped by, and its value: ("rule", "bullet_points")."""

SOURCE_LABEL = "data"
"""Label of a row's source, where there are several."""
LABEL_COLUMNS = ("main_source", "original_source", "source", "rule", "held_out")
"""Columns whose text is a label, if the row has one."""

_CHUNK = 512
"""Conversations tokenized at once: enough for all cores, and few enough to hold their texts."""


@dataclass(frozen=True, slots=True)
class LabelledConversation:
    """A conversation, and its labels in the data."""

    conversation: Conversation
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True, slots=True)
class Variants:
    """One row's answers under several system messages, tokenized.

    - `own`, each of `others`, `none`: usually one piece; several if the template rewrites earlier turns;
    - `instruction`: a number that siblings share;
    - `siblings`: whether `others` are the messages of siblings.
    """

    conversation: Conversation
    instruction: int
    labels: tuple[Label, ...]
    own: list[EncodedRow]
    others: list[list[EncodedRow]]
    none: list[EncodedRow]
    siblings: bool

    @property
    def place(self) -> str:
        """The place of the row: its file and line or row number."""
        return self.conversation.place

    @property
    def all(self) -> list[list[EncodedRow]]:
        """Pieces under the row's own message, under the others, and under none."""
        return [self.own, *self.others, self.none]

    @property
    def tokens(self) -> int:
        """Number of trained tokens under the row's own message."""
        return sum(count_trained_tokens(piece) for piece in self.own)

    @property
    def same_answer(self) -> bool:
        """True if the answers have the same tokens under every message; a token at a template's border may differ."""
        answers = [np.concatenate([answer_ids(piece) for piece in pieces]) for pieces in self.all]
        return all(np.array_equal(answers[0], answer) for answer in answers[1:])


@dataclass(frozen=True, slots=True)
class VariantRows:
    """Rows that can be measured. `dropped`: the others by reason; `examples`: the first of each reason."""

    rows: list[Variants]
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, place: str, reason: str, detail: str = "") -> None:
        """Count a row that can't be measured."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, f"{place}: {detail}" if detail else place)


def count_trained_tokens(piece: EncodedRow) -> int:
    """Return the number of trained tokens."""
    return int((piece.trained[:, 1] - piece.trained[:, 0]).sum())


def answer_ids(piece: EncodedRow) -> np.ndarray:
    """Return the ids of the trained tokens."""
    return np.concatenate([piece.ids[start:end] for start, end in piece.trained.tolist()] or [piece.ids[:0]])


def read_labelled_conversations(
    sources: Sequence[Source],
    columns: Iterable[str] = (),
    *,
    places: Container[str] | None = None,
    allow_pickle: bool = False,
    in_pairs: bool = False,
) -> list[LabelledConversation | tuple[str, RowError]]:
    """Read every row of `sources` with its labels; a bad row gives its place and error.

    - `columns`: further columns whose text is a label. With several sources each is a label too;
    - `places`: read only the rows at these places;
    - `in_pairs`: rows may be pairs, of which the chosen half is read.

    Raises UserError if a source can't be read.
    """
    rows: list[LabelledConversation | tuple[str, RowError]] = []
    columns = (*LABEL_COLUMNS, *columns)
    for source in sources:
        opened = open_source(source, allow_pickle)
        source_label: tuple[Label, ...] = ((SOURCE_LABEL, source.path),) if len(sources) > 1 else ()
        chunks, format = chunks_and_format(source, opened, detect_format=detect_with_pairs if in_pairs else detect)
        for number, chunk in chunks:
            for place_in_file, row in chunk.rows():
                place = opened.files[number] + place_in_file
                if places is not None and place not in places:
                    continue
                try:
                    if isinstance(row, RowError):
                        raise row
                    if format == PREFERENCE:
                        conversation = read_pair(row, place, ignore=source.ignore).chosen
                    else:
                        conversation = read_row(row, format, place, ignore=source.ignore)
                    rows.append(LabelledConversation(conversation, source_label + read_labels(row, columns)))
                except RowError as error:
                    rows.append((place, error))
    return rows


def read_labels(row: RawRow, columns: Iterable[str] = LABEL_COLUMNS) -> tuple[Label, ...]:
    """Return the labels in the columns of a row; of a Janus row also the dimensions of its preference set.

    The label of a dimension is its sub-dimension: ("style", "conciseness"). Values of other types give no label.
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
class SelectedRow:
    """A row to measure, and other messages to score its answers under. `instruction`, `siblings`: as of Variants."""

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
    on_progress: Callable[[int], None] | None = None,
) -> VariantRows:
    """Make the variants of each row: under its own system message, up to `others` others, and none.

    - `limit`: maximum number of rows, drawn by the seed; their other messages come from all rows;
    - `max_length`: rows with more tokens under any of their messages are dropped;
    - `on_progress`: is called with the number of rows tokenized.

    Rows are dropped, and counted, if they have no system message, can't be tokenized as for training, or if there is no
    other message.
    """
    variants = VariantRows([])
    selected = select_rows(rows, variants, others=others, limit=limit, seed=seed)
    encode_variants(selected, tokenizer, variants, max_length=max_length, on_progress=on_progress)
    return variants


def select_rows(
    rows: Sequence[LabelledConversation | tuple[str, RowError]],
    variants: VariantRows,
    *,
    others: int = 2,
    limit: int | None = None,
    seed: int = 0,
) -> list[SelectedRow]:
    """Select the rows to measure, with other messages; `variants` counts the dropped ones."""
    candidates: list[tuple[LabelledConversation, int]] = []
    sibling_messages: dict[int, list[str]] = defaultdict(list)
    numbers: dict[str, int] = {}
    for row in rows:
        if not isinstance(row, LabelledConversation):
            variants.drop(row[0], row[1].kind, row[1].detail)
            continue
        system, _ = split_system_message(row.conversation.messages)
        if not system:
            variants.drop(row.conversation.place, "no system message")
            continue
        number = numbers.setdefault(_instruction(row.conversation), len(numbers))
        sibling_messages[number].append(system)
        candidates.append((row, number))
    messages = {number: list(dict.fromkeys(texts)) for number, texts in sibling_messages.items()}
    all_messages = list(dict.fromkeys(text for texts in messages.values() for text in texts))
    indices = range(len(candidates))
    if limit is not None and limit < len(candidates):
        indices = sorted(random.Random(f"limit {seed}").sample(range(len(candidates)), limit))  # type: ignore[assignment]
    selected: list[SelectedRow] = []
    for index in indices:
        row, number = candidates[index]
        own, _ = split_system_message(row.conversation.messages)
        rng = random.Random(f"{seed} {index}")  # one per row, so that a draw doesn't depend on the other rows drawn
        of_siblings = [text for text in messages[number] if text != own]
        drawn = rng.sample(of_siblings, min(others, len(of_siblings))) or _draw_others(all_messages, own, others, rng)
        if not drawn:
            variants.drop(row.conversation.place, "no other system message in the data")
            continue
        selected.append(SelectedRow(row, number, drawn, bool(of_siblings)))
    return selected


def encode_variants(
    selected: Sequence[SelectedRow],
    tokenizer: RowTokenizer,
    variants: VariantRows,
    *,
    max_length: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Tokenize the rows and add them to `variants`, which counts the dropped ones."""
    for start in range(0, len(selected), _CHUNK):
        chunk = selected[start : start + _CHUNK]
        _encode_chunk(chunk, tokenizer, max_length, variants)
        if on_progress:
            on_progress(len(chunk))


def split_system_message(messages: list[Message]) -> tuple[str, list[Message]]:
    """Return the leading system message (several in a row joined by a blank line), and the other messages."""
    first = next((number for number, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return "\n\n".join(message["content"] for message in messages[:first]).strip(), messages[first:]


def _instruction(conversation: Conversation) -> str:
    """Return a text that siblings share: the tools, and all turns but the answers and the leading system message."""
    _, rest = split_system_message(conversation.messages)
    prompts = [(message["role"], message["content"]) for message in rest if message["role"] != "assistant"]
    return json.dumps([prompts, conversation.tools], sort_keys=True, default=str)


def _draw_others(messages: list[str], own: str, count: int, rng: random.Random) -> list[str]:
    """Draw up to `count` of the messages, which all differ, without `own`."""
    drawn = rng.sample(range(len(messages)), min(count + 1, len(messages)))
    return [messages[index] for index in drawn if messages[index] != own][:count]


def _encode_chunk(
    rows: Sequence[SelectedRow], tokenizer: RowTokenizer, max_length: int | None, variants: VariantRows
) -> None:
    conversations: list[Conversation] = []
    for selected in rows:
        own = selected.row.conversation
        _, rest = split_system_message(own.messages)
        heads: list[list[Message]] = [[{"role": "system", "content": text}] for text in selected.others]
        conversations += [own, *(replace(own, messages=head + rest) for head in heads), replace(own, messages=rest)]
    encoded = iter(tokenizer.encode(conversations))
    for selected in rows:
        place = selected.row.conversation.place
        results: list[Any] = [next(encoded) for _ in range(len(selected.others) + 2)]
        error = next((result for result in results if isinstance(result, RowError)), None)
        if error is not None:
            variants.drop(place, error.kind, error.detail)
            continue
        longest = max(len(piece.ids) for pieces in results for piece in pieces)
        if max_length is not None and longest > max_length:
            variants.drop(place, f"more than {max_length:,} tokens", f"{longest:,}")
            continue
        own_pieces, *others, none = results
        variants.rows.append(
            Variants(
                selected.row.conversation,
                selected.instruction,
                selected.row.labels,
                own_pieces,
                others,
                none,
                selected.siblings,
            )
        )
