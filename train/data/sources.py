"""Where rows come from: files, folders, globs, saved data sets and the hub -> conversations, weighted and split.

Rows of one source share one format, the one that its first row shows. A folder whose files tell their split by their
names (train-00000.parquet, data/test.jsonl) gives the files of the source's split; a glob gives all that it names.
"""

import difflib
import glob
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.data.files import READERS, ROWS_AT_A_TIME, PlacedRow, arrow_rows, ending_of, first_line, read_file
from train.data.formats import Conversation, Row, RowFault, convert, detect
from train.errors import UserError
from train.recipe import DataSection, Source

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that can't be trained: where it stands and what is wrong with it."""

    place: str
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: {self.detail}"


@dataclass(slots=True)
class BadRows:
    """How many rows share one kind of fault, and the first three of them."""

    count: int = 0
    examples: list[BadRow] = field(default_factory=list)

    def add(self, place: str, detail: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(BadRow(place, detail))


@dataclass(frozen=True, slots=True)
class Loaded:
    """The conversations of a recipe.

    `train` follows the sources' order and weights; a row seen twice is the same object twice. `bad`: faults by kind,
    of training and validation sources together. `rows_per_source`: good rows in each source of `data.sources`, before
    any were held out and before weighting.
    """

    train: list[Conversation]
    validation: list[Conversation]
    bad: dict[str, BadRows]
    rows_per_source: list[int]


def load(data: DataSection, seed: int, on_progress: Callable[[int], object] | None = None) -> Loaded:
    """Read all sources, hold out `data.validation` and apply the weights. The same data and seed give the same rows.

    `on_progress` is told, now and then, how many more rows have been read.
    Raises UserError for a source that can't be read or holds no good row, and for bad rows unless they are skipped:
    one error, with all of them.
    """
    bad: dict[str, BadRows] = {}
    held_sources = () if data.validation is None or isinstance(data.validation, float) else data.validation
    read = _read_all("data.sources", data.sources, data.allow_pickle, bad, on_progress)
    held = _read_all("data.validation", held_sources, data.allow_pickle, bad, on_progress)
    good = sum(map(len, read)) + sum(map(len, held))
    if bad and (data.on_bad_row == "error" or not good):
        raise _bad_rows_error(bad, good, skipped=data.on_bad_row == "skip")
    _refuse_empty("data.sources", data.sources, read, bad)
    _refuse_empty("data.validation", held_sources, held, bad)
    rows_per_source = [len(part) for part in read]
    if isinstance(data.validation, float):
        read, validation = _hold_out(read, data.validation, seed)
    else:
        validation = _mix("data.validation", held_sources, held, seed)
    return Loaded(_mix("data.sources", data.sources, read, seed), validation, bad, rows_per_source)


def _read_all(
    key: str,
    sources: Sequence[Source],
    allow_pickle: bool,
    bad: dict[str, BadRows],
    on_progress: Callable[[int], object] | None,
) -> list[list[Conversation]]:
    """The good rows of each source; the bad ones go into `bad`. Errors name the key of their source."""
    parts: list[list[Conversation]] = []
    for number, source in enumerate(sources):
        part: list[Conversation] = []
        format: str | None = None if source.format == "auto" else source.format
        unreported = 0
        try:
            for place, row in read_rows(source, allow_pickle):
                try:
                    if isinstance(row, RowFault):
                        raise row
                    format = format or _detect(row, place)
                    part.append(Conversation(*convert(row, format), number, place))
                except RowFault as fault:
                    bad.setdefault(fault.kind, BadRows()).add(place, fault.detail)
                unreported += 1
                if on_progress and unreported == ROWS_AT_A_TIME:
                    on_progress(unreported)
                    unreported = 0
        except UserError as fault:
            raise UserError(f"{key}.{number}: {fault}") from fault
        if on_progress and unreported:
            on_progress(unreported)
        parts.append(part)
    return parts


def _refuse_empty(key: str, sources: Sequence[Source], parts: Sequence[Sequence[Any]], bad: dict[str, BadRows]) -> None:
    for number, (source, part) in enumerate(zip(sources, parts, strict=True)):
        if not part:
            raise UserError(f"{key}.{number}: no row of {source.path} can be trained. Faults of all: {_summary(bad)}.")


def _detect(row: Row, place: str) -> str:
    try:
        return detect(row)
    except UserError as fault:
        raise UserError(f"{place}: {fault}") from fault


def _summary(bad: dict[str, BadRows]) -> str:
    kinds = sorted(bad.items(), key=lambda item: -item[1].count)
    return "; ".join(f"{rows.count:,} x {kind}: {' | '.join(map(str, rows.examples))}" for kind, rows in kinds)


def _bad_rows_error(bad: dict[str, BadRows], good: int, skipped: bool) -> UserError:
    count = sum(rows.count for rows in bad.values())
    remedy = "Mend them, or leave them out (they are counted on the screen) with `data.on_bad_row: skip`."
    if skipped or not good:
        remedy = "No row is left. Is data.sources.N.format the right one?"
    return UserError(f"data: {count:,} of {good + count:,} rows can't be trained. {_summary(bad)}. {remedy}")


def _mix(key: str, sources: Sequence[Source], parts: Sequence[Sequence[Conversation]], seed: int) -> list[Conversation]:
    """All rows as often as their source's weight says. What is sampled from one source depends on no other."""
    mixed: list[Conversation] = []
    for number, (source, part) in enumerate(zip(sources, parts, strict=True)):
        whole = int(source.weight)
        sampled = round((source.weight - whole) * len(part))
        if part and not whole and not sampled:
            raise UserError(f"{key}.{number}.weight: {source.weight} of {len(part):,} rows is none. Write more.")
        chance = random.Random(f"weight {seed} {source.path} {source.name} {source.split}")
        for _ in range(whole):
            mixed += part
        mixed += [part[row] for row in sorted(chance.sample(range(len(part)), sampled))]
    return mixed


def _hold_out(
    parts: Sequence[Sequence[Conversation]], share: float, seed: int
) -> tuple[list[list[Conversation]], list[Conversation]]:
    """About `share` of the rows apart, by whole groups of the same first user message: (what stays, what is held out).

    Multifaceted Collection has each instruction under three system messages; one seen in training would make the
    validation loss a lie. Groups are taken in the order of a hash, so more sources change little in what is chosen.
    """
    groups: dict[bytes, int] = {}
    keys = [[_group(conversation, seed) for conversation in part] for part in parts]
    for key in (key for part in keys for key in part):
        groups[key] = groups.get(key, 0) + 1
    if len(groups) < 2:
        raise UserError(
            "data.validation: every row begins with the same user message, so no share of them can be held out without "
            "the same question in both parts. Name validation sources of their own."
        )
    rows = sum(groups.values())
    wanted = min(max(round(share * rows), 1), rows - 1)
    chosen: set[bytes] = set()
    count = 0
    for key, size in sorted(groups.items()):
        if count + size <= wanted:
            chosen.add(key)
            count += size
    if not chosen:  # every group is larger than the share
        chosen.add(min(groups, key=lambda key: (groups[key], key)))
    kept: list[list[Conversation]] = []
    held: list[Conversation] = []
    for part, part_keys in zip(parts, keys, strict=True):
        kept.append([row for row, key in zip(part, part_keys, strict=True) if key not in chosen])
        held += [row for row, key in zip(part, part_keys, strict=True) if key in chosen]
    return kept, held


def _group(conversation: Conversation, seed: int) -> bytes:
    first = next((turn for turn in conversation.messages if turn["role"] == "user"), conversation.messages[0])
    text = " ".join(first["content"].split())
    return hashlib.blake2b(f"{seed} {text}".encode(), digest_size=16).digest()


def read_rows(source: Source, allow_pickle: bool = False) -> Iterator[PlacedRow]:
    """Every row of `source` with its place, or the fault of a row that can't even be read; streaming where files can.

    Lines and rows count from 1. Raises UserError for what isn't there, is empty, has an unknown ending, or is a pickle
    that nobody allowed.
    """
    path = Path(source.path).expanduser()
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        yield from _saved(path, source)
        return
    if path.is_dir():
        files = _files_of_split(path, source.split)
    elif path.exists():
        files = [path]
    elif glob.has_magic(source.path):
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not files:
            raise UserError(f"{source.path}: no file matches this pattern in {Path.cwd()}.")
    elif _may_be_hub_id(source.path):
        yield from _hub(source)
        return
    else:
        raise UserError(f"{source.path}: {_not_there(path)}")
    _refuse_hub_keys(source, files_have_splits=path.is_dir())
    for file in files:
        yield from read_file(file, allow_pickle)


def _refuse_hub_keys(source: Source, files_have_splits: bool) -> None:
    """Raise UserError for keys that would do nothing: a wish that isn't met in silence."""
    given = [key for key in ("name", "revision") if getattr(source, key) is not None]
    if source.split != "train" and not files_have_splits:
        given.append("split")
    if given:
        raise UserError(
            f"{source.path}: `{given[0]}: {getattr(source, given[0])}` has no meaning for local files. Take it out, or "
            "name in `path` the file you mean."
        )


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files below `folder`; where their names tell a split, those of `split`. Raises UserError."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and ending_of(path) in READERS]
    files = [path for path in found if not any(part[0] in "._" for part in path.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{folder}: no data file in this folder. Known endings are {', '.join(READERS)}.")
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    if not any(splits.values()) and split == "train":
        return files
    unclear = [path for path in files if splits[path] is None]
    if unclear:
        raise UserError(
            f"{folder}: is {unclear[0].name} part of the split `{split}`? Its name doesn't tell"
            f"{', others do' if any(splits.values()) else ''}. Name a file or a glob in `path` instead."
        )
    wanted = _split_of(Path(split)) or split
    chosen = [path for path in files if splits[path] == wanted]
    if not chosen:
        known = ", ".join(sorted({name for name in splits.values() if name}))
        raise UserError(f"{folder}: there are no files of the split `{split}`. The names tell of: {known}.")
    return chosen


def _split_of(path: Path) -> str | None:
    """The split that a file's name tells, or else a folder's: `train` of train-00000-of-00002.parquet."""
    words = [word for part in path.parts for word in re.split("[^a-z]+", part.lower())]
    told = [split for word in words for split, names in _SPLITS.items() if word in names]
    return told[-1] if told else None


def _saved(folder: Path, source: Source) -> Iterator[PlacedRow]:
    """The rows of a folder that datasets' `save_to_disk` wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as fault:  # whatever a half-written folder brings up
        raise UserError(f"{folder}: the saved data set can't be opened: {first_line(fault)}.") from fault
    splits = isinstance(saved, datasets.DatasetDict)
    _refuse_hub_keys(source, files_have_splits=splits)
    if splits and source.split not in saved:
        raise UserError(f"{folder}: there is no split `{source.split}`. It has: {', '.join(saved)}.")
    if splits:
        yield from _dataset_rows(saved[source.split], f"{folder}[{source.split}]")
    else:
        yield from _dataset_rows(saved, str(folder))


def _hub(source: Source) -> Iterator[PlacedRow]:
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as fault:  # of many libraries, and all of them about the id, the split, the login or the network
        tried = f"split `{source.split}`" + (f", configuration `{source.name}`" if source.name else "")
        tried += f", revision `{source.revision}`" if source.revision else ""
        here = _not_there(Path(source.path)).rstrip(".")
        raise UserError(
            f"{source.path}: no file or folder here ({here}), and the Hugging Face hub didn't give a data set of that "
            f"name ({tried}): {type(fault).__name__}: {first_line(fault)}. Check the id, the split and the network; a "
            "private or gated one needs `hf auth login`."
        ) from fault
    yield from _dataset_rows(loaded, f"{source.path}{f':{source.name}' if source.name else ''}[{source.split}]")


def _dataset_rows(dataset: Any, name: str) -> Iterator[PlacedRow]:
    if not len(dataset):
        raise UserError(f"{name}: the data set holds no rows.")
    # Arrow's own values: nothing is decoded, so images beside the text cost nothing and need no library.
    yield from arrow_rows(dataset.with_format("arrow").iter(ROWS_AT_A_TIME), name)


def _may_be_hub_id(path: str) -> bool:
    known = ending_of(Path(path)) in READERS
    return not known and re.fullmatch(r"[A-Za-z0-9][\w-]*|[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None


def _not_there(path: Path) -> str:
    """Which part of a path is missing, and what has nearly that name."""
    missing = next(part for part in [*reversed(path.parents), path] if not part.exists())
    folder = missing.parent
    names = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
    near = [str(folder / name) for name in difflib.get_close_matches(missing.name, names, n=2, cutoff=0.7)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"there is no {missing.name} in {folder.absolute()}.{hint}"
