"""Sources -> conversations -> tokens -> the rows that are trained, and the account of what became of every row."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from train.data.formats import Conversation, RowFault
from train.data.loss_mask import NOT_TRAINED, Encoded
from train.data.packing import pack
from train.data.sources import BadRows, load
from train.data.tokenize import tokenize
from train.errors import UserError
from train.progress import job
from train.recipe import DataSection, Recipe


@dataclass
class Account:
    """What became of the rows of one part. Tokens are counted after cutting; `overlong_tokens` are those lost to it."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    sequences: int = 0
    overlong_rows: int = 0
    overlong_tokens: int = 0
    longest: int = 0
    longest_place: str = ""
    faults: dict[str, BadRows] = field(default_factory=dict)

    @property
    def tokens_per_sequence(self) -> float:
        """Mean number of tokens in a row as it is trained."""
        return self.tokens / max(self.sequences, 1)


@dataclass(frozen=True)
class Part:
    """The rows of training or validation: columns input_ids, labels and, where packed, seq_lengths; all int32 lists."""

    rows: Dataset
    account: Account


@dataclass(frozen=True)
class Prepared:
    """All that training needs of the data."""

    train: Part
    validation: Part | None


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, encode and pack what the recipe names. The tokenizer holds the template with its generation marks.

    The same recipe and data give the same rows in the same order, in every process.
    Raises UserError for rows that can't be trained, unless the recipe says to leave them out.
    """
    with job("reading", unit="rows") as reading:
        loaded = load(recipe.data, recipe.seed, on_progress=reading.advance)
    train = _prepare_part("training", loaded.train, recipe, tokenizer)
    train.account.faults.update(loaded.bad)
    validation = _prepare_part("validation", loaded.validation, recipe, tokenizer) if loaded.validation else None
    return Prepared(train, validation)


def _prepare_part(
    name: str, conversations: Sequence[Conversation], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> Part:
    account = Account()
    encoded: list[Encoded] = []
    with job(f"tokenizing {name} rows", total=len(conversations), unit="rows") as tokenizing:
        chat = recipe.chat
        for conversation, result in tokenize(tokenizer, conversations, chat.train_on, chat.control_tokens_in_text):
            tokenizing.advance()
            if isinstance(result, RowFault):
                account.faults.setdefault(result.kind, BadRows()).add(conversation.place, result.detail)
                continue
            fitted = (_fit(row, conversation.place, recipe.data, account) for row in result)
            encoded += [row for row in fitted if row is not None]
    _refuse_faults(account, recipe.data)
    if not encoded:
        raise UserError(
            f"data: no {name} row is left of {len(conversations):,}: {account.overlong_rows:,} were longer than "
            f"data.max_length ({recipe.data.max_length:,}; the longest has {account.longest:,} tokens), "
            f"{sum(rows.count for rows in account.faults.values()):,} had faults."
        )
    account.rows = len(encoded)
    account.tokens = sum(len(row.input_ids) for row in encoded)
    account.trained_tokens = sum(label != NOT_TRAINED for row in encoded for label in row.labels)
    if recipe.data.packing:
        sequences = pack([len(row.input_ids) for row in encoded], recipe.data.max_length)
    else:
        sequences = [[row] for row in range(len(encoded))]
    account.sequences = len(sequences)
    return Part(_as_dataset(encoded, sequences, packed=recipe.data.packing), account)


def _fit(row: Encoded, place: str, data: DataSection, account: Account) -> Encoded | None:
    """The row as `data.overlong` wants it; None where it is dropped. Counts what is lost."""
    length = len(row.input_ids)
    if length > account.longest:
        account.longest, account.longest_place = length, place
    if length <= data.max_length:
        return row
    account.overlong_rows += 1
    labels = row.labels[: data.max_length]
    if data.overlong == "truncate" and any(label != NOT_TRAINED for label in labels):
        account.overlong_tokens += length - data.max_length
        return Encoded(row.input_ids[: data.max_length], labels)
    account.overlong_tokens += length
    return None


def _refuse_faults(account: Account, data: DataSection) -> None:
    if account.faults and data.on_bad_row == "error":
        kinds = "; ".join(
            f"{rows.count:,} {kind}, first {rows.examples[0]}" for kind, rows in sorted(account.faults.items())
        )
        raise UserError(f"data: rows that can't be trained: {kinds}. Mend them, or write `data.on_bad_row: skip`.")
    if account.overlong_rows and data.overlong == "error":
        raise UserError(
            f"data: {account.overlong_rows:,} rows have more tokens than data.max_length ({data.max_length:,}); the "
            f"longest has {account.longest:,} ({account.longest_place}). Write a larger max_length, or say what "
            "happens to them: `data.overlong: drop` or `data.overlong: truncate`."
        )


def _as_dataset(encoded: Sequence[Encoded], sequences: Sequence[Sequence[int]], *, packed: bool) -> Dataset:
    """The rows of each sequence one after the other, as Arrow lists of int32."""
    columns = {
        "input_ids": [_join([encoded[row].input_ids for row in rows]) for rows in sequences],
        "labels": [_join([encoded[row].labels for row in rows]) for rows in sequences],
    }
    if packed:
        columns["seq_lengths"] = [_join([[len(encoded[row].input_ids) for row in rows]]) for rows in sequences]
    return Dataset(pyarrow.table({name: _lists(values) for name, values in columns.items()}))


def _join(parts: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def _lists(values: Sequence[NDArray[np.int32]]) -> pyarrow.LargeListArray:
    ends = np.cumsum([0, *(len(value) for value in values)], dtype=np.int64)
    return pyarrow.LargeListArray.from_arrays(ends, np.concatenate(values))
