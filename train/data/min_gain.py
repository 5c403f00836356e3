"""Rows that ignore their message: left out by `min_gain` of a source, once they are tokenized.

The file is the gain_rows.jsonl of `scripts/evaluate.py gain`: a line for each measured row, with a digest of its
conversation (messages, tools and template variables) and its gain. Rows are found by the digest, so the data may have
another path, order or format.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.sources.source import BadRows
from train.data.tokens.table import TokenTable
from train.errors import UserError
from train.recipe import TrainingSource


@dataclass(frozen=True, slots=True)
class GainFilter:
    """Effect of the `min_gain` of one source.

    - `key`: the source's key in the recipe; `file`: the value of `min_gain`.
    - `rows`: conversations of the source; `left_out`: those with a gain of 0 or less.
    - `unmeasured`: number of those that the file does not have; they stay.
    """

    key: str
    file: str
    rows: int
    left_out: BadRows
    unmeasured: int


def apply_min_gain(
    key: str, source: TrainingSource, conversations: NDArray[np.int64], table: TokenTable, first_rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], GainFilter | None]:
    """Return the conversations of one source that its `min_gain` keeps, and its effect: None without that key.

    `first_rows`: the first row of each conversation in `table`.
    Raises UserError, naming `key`, if the file can't be read, has none of these rows, or leaves none.
    """
    if source.min_gain is None:
        return conversations, None
    key = f"{key}.min_gain"
    gains = read_row_gains(key, source.min_gain, source)
    rows = first_rows[conversations]
    of_rows = [gains.get(digest) for digest in table.digests[rows].tolist()]
    kept = np.array([gain is None or not gain <= 0 for gain in of_rows], bool)  # NaN is not 0 or less
    unmeasured = of_rows.count(None)
    if unmeasured == len(rows):
        raise UserError(
            f"{key}: {source.min_gain} has none of the {len(rows):,} rows of {source.path}. {_measure_again(source)}"
        )
    if not kept.any():
        raise UserError(
            f"{key}: each of the {len(rows):,} rows of {source.path} has a gain of 0 or less in {source.min_gain}, so "
            "none is left. Remove the key or the source."
        )
    left_out = BadRows()
    for number in np.flatnonzero(~kept).tolist():
        left_out.add(table.place(rows[number]), f"gain {of_rows[number]:.3f}")
    return conversations[kept], GainFilter(key, source.min_gain, len(rows), left_out, unmeasured)


def read_row_gains(key: str, file: str, source: TrainingSource) -> dict[bytes, float]:
    """Return the gain of each row of a gain_rows.jsonl by the digest of its conversation, as numpy returns digests.

    Of equal conversations the largest gain counts, of two models that after training (`--model`).
    Raises UserError, naming `key` and the command that measures `source`, if the file can't be read or a line has no
    digest or gain.
    """
    gains: dict[bytes, float] = {}
    try:
        with Path(file).open(encoding="utf-8", errors="replace") as lines:  # of another file each line is an error
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    models = {name: values for name, values in record.items() if isinstance(values, dict)}
                    gain = float((models.get("after") or next(iter(models.values())))["gain"])
                    digest = bytes.fromhex(record["conversation"]).rstrip(b"\0")
                except (ValueError, TypeError, LookupError, AttributeError, StopIteration) as error:
                    raise UserError(
                        f"{key}: {file}:{number}: no `conversation` with its `gain`: it is another file, or an older "
                        f"version wrote it. {_measure_again(source)}"
                    ) from error
                gains[digest] = max(gain, gains.get(digest, gain))
    except OSError as error:
        raise UserError(f"{key}: {file} can't be read: {error.strerror}.") from error
    return gains


def _measure_again(source: TrainingSource) -> str:
    options = shlex.join(["--data", source.path, *(["--ignore", *source.ignore] if source.ignore else [])])
    return f"Write it anew: `python scripts/evaluate.py gain --model MODEL {options}`."
