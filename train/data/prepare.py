"""Sources -> conversations -> tokens -> the rows that are trained, and the account of what became of every row."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from train.data.formats import Conversation, RowFault
from train.data.loss_mask import NOT_TRAINED, Encoded
from train.data.packing import pack
from train.data.sources import BadRows, load
from train.data.survey import Fingerprints, Overlap, Repeats, choose_examples, fingerprints, has_system, overlap
from train.data.tokenize import tokenize
from train.errors import UserError
from train.progress import job
from train.recipe import DataSection, Recipe


class Row(NamedTuple):
    """One row as it is trained: int32 token ids, as many labels, and the conversation that it came from."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    conversation: Conversation


@dataclass
class Account:
    """What became of the rows of one part.

    `conversations`: those read, as often as the weights say. `rows`: those trained; a template that rewrites history
    makes several of one conversation. `tokens` are counted after cutting; `overlong_tokens` are those lost to it.
    `lengths`: tokens of every row before cutting or dropping. `overlong`: rows longer than data.max_length by what
    became of them, refused, dropped or truncated. `faults`: conversations that can't be trained, by kind.
    `documents_per_sequence`: rows in each sequence. `examples`: a few rows to look at.
    """

    conversations: int = 0
    rows: int = 0
    rows_with_system: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    longest_place: str = ""
    overlong: dict[str, BadRows] = field(default_factory=dict)
    overlong_tokens: int = 0
    faults: dict[str, BadRows] = field(default_factory=dict)
    documents_per_sequence: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    duplicates: Repeats = field(default_factory=Repeats)
    examples: list[Row] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        """Rows of the data set that is trained: packed ones where the recipe packs."""
        return len(self.documents_per_sequence)

    @property
    def tokens_per_sequence(self) -> float:
        """Mean number of tokens in a row as it is trained."""
        return self.tokens / max(self.sequences, 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, before cutting."""
        return int(self.lengths.max(initial=0))


@dataclass(frozen=True)
class Part:
    """The rows of training or validation: columns input_ids, labels and, where packed, seq_lengths; all int32 lists."""

    rows: Dataset
    account: Account


@dataclass(frozen=True)
class Prepared:
    """All that training needs of the data. `unreadable`: faults found before a template was involved, by kind."""

    train: Part
    validation: Part | None
    unreadable: Mapping[str, BadRows] = field(default_factory=dict)
    overlap: Overlap = field(default_factory=Overlap)

    @property
    def accounts(self) -> dict[str, Account]:
        """The accounts of the parts that there are, by name."""
        parts = {"training": self.train, "validation": self.validation}
        return {name: part.account for name, part in parts.items() if part}

    @property
    def faults(self) -> dict[str, BadRows]:
        """Rows that can't be trained, of all parts, by kind."""
        merged: dict[str, BadRows] = {}
        for faults in (self.unreadable, *(account.faults for account in self.accounts.values())):
            for kind, rows in faults.items():
                before = merged.get(kind, BadRows())
                merged[kind] = BadRows(before.count + rows.count, [*before.examples, *rows.examples][:3])
        return merged


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, encode and pack what the recipe names. The tokenizer holds the template with its generation marks.

    The same recipe and data give the same rows in the same order, in every process.
    Raises UserError for rows that can't be trained, unless the recipe says to leave them out: one error, with all.
    """
    data = examine(recipe, tokenizer)
    fault = refusal(data, recipe.data)
    if fault:
        raise UserError(fault)
    return data


def examine(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """`prepare`, but rows that the recipe refuses are left out and told by the account; there may be no row left.

    Raises UserError where a source can't be read or has no row of use.
    """
    lenient = recipe.data.model_copy(update={"on_bad_row": "skip"})
    with job("reading", unit="rows") as reading:
        loaded = load(lenient, recipe.seed, on_progress=reading.advance)
    train = _examine_part("training", loaded.train, recipe, tokenizer)
    if not loaded.validation:
        return Prepared(train, None, loaded.bad)
    validation = _examine_part("validation", loaded.validation, recipe, tokenizer)
    shared = overlap(train.account.fingerprints, validation.account.fingerprints)
    return Prepared(train, validation, loaded.bad, shared)


def refusal(data: Prepared, section: DataSection) -> str | None:
    """Why these rows can't be trained under this recipe, and what to change: all of it in one paragraph, or None."""
    reasons = []
    if data.faults and section.on_bad_row == "error":
        kinds = sorted(data.faults.items(), key=lambda item: -item[1].count)
        named = "; ".join(f"{rows.count:,} {kind}: {' | '.join(map(str, rows.examples))}" for kind, rows in kinds)
        reasons.append(
            f"rows that can't be trained: {named}. Mend them, or leave them out (they are counted on the screen) with "
            "`data.on_bad_row: skip`."
        )
    for name, account in data.accounts.items():
        if refused := account.overlong.get("refused"):
            reasons.append(
                f"{refused.count:,} {name} rows have more tokens than data.max_length ({section.max_length:,}); the "
                f"longest has {account.longest:,} ({account.longest_place}). Write a larger max_length, or say what "
                "happens to them: `data.overlong: drop` or `data.overlong: truncate`."
            )
        if not account.rows:
            overlong = sum(rows.count for rows in account.overlong.values())
            reasons.append(
                f"no {name} row is left of {account.conversations:,}: {overlong:,} were longer than "
                f"data.max_length ({section.max_length:,}; the longest has {account.longest:,} tokens), "
                f"{sum(rows.count for rows in account.faults.values()):,} had faults."
            )
    return f"data: {' '.join(reasons)}" if reasons else None


def _examine_part(
    name: str, conversations: Sequence[Conversation], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> Part:
    account = Account(conversations=len(conversations))
    kept: list[Row] = []
    lengths: list[int] = []
    places: list[str] = []
    with job(f"tokenizing {name} rows", total=len(conversations), unit="rows") as tokenizing:
        chat = recipe.chat
        for conversation, result in tokenize(tokenizer, conversations, chat.train_on, chat.control_tokens_in_text):
            tokenizing.advance()
            if isinstance(result, RowFault):
                account.faults.setdefault(result.kind, BadRows()).add(conversation.place, result.detail)
                continue
            for encoded in result:
                lengths.append(len(encoded.input_ids))
                places.append(conversation.place)
                fitted = _fit(encoded, conversation, recipe.data, account)
                if fitted is not None:
                    kept.append(fitted)
    account.lengths = np.asarray(lengths, np.int32)
    account.longest_place = places[int(account.lengths.argmax())] if places else ""
    _count(kept, account, recipe.seed)
    if recipe.data.packing:
        sequences = pack([len(row.input_ids) for row in kept], recipe.data.max_length)
    else:
        sequences = [[row] for row in range(len(kept))]
    account.documents_per_sequence = np.fromiter(map(len, sequences), np.int32)
    return Part(_as_dataset(kept, sequences, packed=recipe.data.packing), account)


def _fit(encoded: Encoded, conversation: Conversation, data: DataSection, account: Account) -> Row | None:
    """The row as `data.overlong` wants it; None where it is dropped or refused. Counts what is lost.

    The lists of Python numbers, 9 to 40 bytes a token, become arrays of 4 at once: a large data set fits in memory.
    """
    row = Row(np.asarray(encoded.input_ids, np.int32), np.asarray(encoded.labels, np.int32), conversation)
    length = len(row.input_ids)
    if length <= data.max_length:
        return row
    outcome = {"error": "refused", "drop": "dropped", "truncate": "truncated"}[data.overlong]
    cut = Row(row.input_ids[: data.max_length], row.labels[: data.max_length], conversation)
    if outcome == "truncated" and (cut.labels == NOT_TRAINED).all():
        outcome = "dropped"
    detail = f"{length:,} tokens"
    account.overlong.setdefault(outcome, BadRows()).add(conversation.place, detail)
    account.overlong_tokens += length - data.max_length if outcome == "truncated" else length
    return cut if outcome == "truncated" else None


def _count(kept: Sequence[Row], account: Account, seed: int) -> None:
    """What there is to say of the rows that are trained, and a few of them to look at, none of them twice."""
    account.rows = len(kept)
    account.tokens = sum(len(row.input_ids) for row in kept)
    account.trained_tokens = sum(int(np.count_nonzero(row.labels != NOT_TRAINED)) for row in kept)
    account.rows_with_system = sum(has_system(row.conversation) for row in kept)
    account.fingerprints = fingerprints(row.conversation for row in kept)
    account.duplicates = account.fingerprints.duplicates()
    first_of = {id(row.conversation): row for row in reversed(kept)}  # of rows that weights repeat and templates split
    once = list(reversed(first_of.values()))
    chosen = choose_examples([has_system(row.conversation) for row in once], seed)
    account.examples = [once[row] for row in chosen]


def _as_dataset(kept: Sequence[Row], sequences: Sequence[Sequence[int]], *, packed: bool) -> Dataset:
    """The rows of each sequence one after the other, as Arrow lists of int32."""
    in_order = [row for rows in sequences for row in rows]
    lengths = np.fromiter((len(row.input_ids) for row in kept), np.int32, len(kept))
    documents = np.fromiter(map(len, sequences), np.int64, len(sequences))
    ends_of_documents = _ends(lengths[in_order])
    ends = ends_of_documents[_ends(documents)]  # tokens up to the end of each sequence
    columns = {
        "input_ids": _lists(ends, [kept[row].input_ids for row in in_order]),
        "labels": _lists(ends, [kept[row].labels for row in in_order]),
    }
    if packed:
        columns["seq_lengths"] = _lists(_ends(documents), [lengths[in_order]])
    return Dataset(pyarrow.table(columns))


def _ends(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Where each of so many things ends that stand one after the other, with a 0 before the first."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _lists(ends: NDArray[np.int64], values: Iterable[NDArray[np.int32]]) -> pyarrow.LargeListArray:
    return pyarrow.LargeListArray.from_arrays(ends, np.concatenate([np.empty(0, np.int32), *values]))
