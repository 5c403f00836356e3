"""Where rows come from: files, folders, globs, saved data sets and the hub.

Rows of one source share one format, the one that its first row shows. A folder whose files tell their split by their
names (train-00000.parquet, data/test.jsonl) gives the files of the source's split; a glob gives all that it names.
"""

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from train.data.sources.arrow import arrow_chunks
from train.data.sources.formats import TEMPLATE_KWARGS, Conversation, RawRow, RowError, detect, read_row, without
from train.data.sources.metadata_files import STATE, companion, was_saved
from train.data.sources.readers import READERS, ROWS_OF_A_CHUNK, Chunk, LocatedRow, ending_of, first_line, read_file
from train.data.sources.row_errors import shown
from train.data.sources.unread_text import Unread, collect, lost_text
from train.errors import UserError
from train.recipe import Source
from train.storage.checksum import hash_files
from train.storage.local_paths import describe_missing_path, looks_like_hub_id

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {word: split for split, words in _SPLITS.items() for word in words}
_SHARD = re.compile(r"((^|[-_. ]+)(part|shard|chunk|file)?[-_. ]*\d+([-_. ]*of[-_. ]*\d+(-[0-9a-f]{16})?)?)+$")
"""The number of a file, behind the name of its split: -00000-of-00002, -00000-of-00002-0123456789abcdef, _1, .part3."""
_EXAMPLES = 3
_COMPANIONS = ("README", "LICENSE", "LICENCE", "NOTICE")
"""What lies beside data and is none, so that nobody need be told."""


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
class OpenSource:
    """A source that is there. `files`: what its rows' places begin with; `chunks`: each with its file's number.

    `skipped_files`: files of its folder that no row comes from, as their names are none of data; READMEs and files that
    begin with a dot aside. `metadata_files`: files that describe the data, with what each is.
    """

    files: list[str]
    chunks: Callable[[], Iterator[tuple[int, Chunk]]]
    digest: Callable[[], str]
    """Of every byte that the rows are read from: another byte, another digest. No names are in it."""
    skipped_files: Sequence[Path] = ()
    metadata_files: Sequence[str] = ()


def open_source(source: Source, allow_pickle: bool = False) -> OpenSource:
    """Find what `source` names. Nothing is read yet.

    Raises UserError for what isn't there or has an unknown ending; while reading, for what is empty, broken, or a
    pickle that nobody allowed.
    """
    path = Path(source.path).expanduser()
    if path.is_dir() and was_saved(path):
        return _saved(path, source)
    skipped_files: list[Path] = []
    metadata_files: dict[Path, str] = {}
    if path.is_dir():
        files, skipped_files, metadata_files = _files_of_split(path, source.split)
    elif path.exists():
        files = [path]
        if what := companion(path):
            raise UserError(
                f"{source.path}: the file is {what}, and no row is in it. Name the file that holds the rows."
            )
    elif glob.has_magic(source.path):
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not files:
            raise UserError(f"{source.path}: no file matches this pattern in {Path.cwd()}.")
        files, metadata_files = _without_companions(files)
        if not files:
            raise UserError(f"{source.path}: no file of rows matches this pattern{_only(metadata_files)}.")
    elif looks_like_hub_id(source.path):
        return _hub(source)
    else:
        raise UserError(f"{source.path}: {describe_missing_path(path)}")
    _refuse_hub_keys(source, files_have_splits=path.is_dir())
    return OpenSource(
        [_printable(file) for file in files],
        lambda: ((number, chunk) for number, file in enumerate(files) for chunk in read_file(file, allow_pickle)),
        lambda: hash_files(files, [ending_of(file) for file in files]),
        skipped_files,
        [f"{_printable(file)} ({what})" for file, what in metadata_files.items()],
    )


def _printable(path: Path) -> str:
    """The path as text that any file can hold: names of files may hold bytes that are none."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def read_rows(source: Source, allow_pickle: bool = False) -> Iterator[LocatedRow]:
    """Every row of `source` with its whole place, or the fault of a row that can't even be read. Raises UserError."""
    opened = open_source(source, allow_pickle)
    for number, chunk in opened.chunks():
        for place, row in chunk.rows():
            yield opened.files[number] + place, row


def read_conversations(source: Source, allow_pickle: bool = False) -> Iterator[tuple[str, Conversation | RowError]]:
    """Every row of `source` as a conversation, with its whole place, or the fault of one that is none.

    `weight` isn't read. Raises UserError.
    """
    opened = open_source(source, allow_pickle)
    chunks, format = chunks_and_format(source, opened)
    for number, chunk in chunks:
        for place, row in chunk.rows():
            whole_place = opened.files[number] + place
            if isinstance(row, RowError):
                yield whole_place, row
                continue
            try:
                yield whole_place, _read_whole(row, format, place, source)
            except RowError as fault:
                yield whole_place, fault


def _read_whole(row: RawRow, format: str, place: str, source: Source) -> Conversation:
    """Read a row for those who ask a model about it. Raises RowFault also where a text of it would not be seen."""
    unread: Unread = {}
    conversation = read_row(row, format, place, ignore=source.ignore, unread=unread)
    for name, value in (conversation.template_kwargs or {}).items():
        collect(unread, f"{TEMPLATE_KWARGS}.{name}", value)
    said = [message["content"] for message in conversation.messages]
    for name, values in unread.items():
        if name not in source.ignore and (text := lost_text(name, values, said)) is not None:
            remedy = f"rename it to what the format {format} reads, or write `ignore: [{name}]` under the source"
            raise RowError("text not read", f"`{name}` holds {shown(text)}: {remedy}")
    return conversation


def count_rows(source: Source, allow_pickle: bool = False) -> int:
    """How many rows `source` has, those that are faulty among them. Raises UserError."""
    return sum(len(chunk) for _, chunk in open_source(source, allow_pickle).chunks())


def chunks_and_format(
    source: Source, opened: OpenSource, as_read: Callable[[RawRow], RawRow] = lambda row: row
) -> tuple[Iterator[tuple[int, Chunk]], str]:
    """The chunks of a source, and its format: the one named, or that of its first row (as `as_read` makes it).

    Raises UserError.
    """
    chunks = opened.chunks()
    if source.format != "auto":
        return chunks, source.format
    seen: list[tuple[int, Chunk]] = []
    for file, chunk in chunks:
        seen.append((file, chunk))
        for place, row in chunk.rows():
            if isinstance(row, RowError):
                continue
            try:
                return chain(seen, chunks), detect(as_read(without(row, source.ignore, {})))
            except UserError as fault:
                raise UserError(f"{opened.files[file]}{place}: {fault}") from fault
    return iter(seen), "messages"  # no row could be read; the faults tell why


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


def _without_companions(files: Iterable[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The files that hold rows, and those that describe the data, with what each is."""
    metadata_files = {path: what for path in files if (what := companion(path))}
    return [path for path in files if path not in metadata_files], metadata_files


def _only(metadata_files: Mapping[Path, str]) -> str:
    named = ", ".join(f"{path.name} ({what})" for path, what in islice(metadata_files.items(), _EXAMPLES))
    return f", only what describes data: {named}" if metadata_files else ""


def _files_of_split(folder: Path, split: str) -> tuple[list[Path], list[Path], dict[Path, str]]:
    """The data files below `folder`, where their names tell a split those of `split`; files that are none of data; and
    files that describe it.

    Raises UserError.
    """
    everything = sorted(
        map(Path, glob.glob(f"{glob.escape(str(folder))}/**/*", recursive=True))
    )  # links to folders, too
    found = [path for path in everything if path.is_file() and not any(part[0] == "." for part in _below(folder, path))]
    files = [
        path
        for path in found
        if ending_of(path) in READERS and not any(part[0] == "_" for part in _below(folder, path))
    ]
    skipped_files = [path for path in found if path not in set(files) and path.stem.upper() not in _COMPANIONS]
    files, metadata_files = _without_companions(files)
    if not files:
        saved = [str(path.parent) for path, what in metadata_files.items() if what == STATE]
        hint = f" To read what save_to_disk wrote, name {saved[0]}." if saved else ""
        raise UserError(
            f"{folder}: no data file in this folder{_only(metadata_files)}. Known endings are {', '.join(READERS)}.{hint}"
        )
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    if not any(splits.values()) and split == "train":
        return files, skipped_files, metadata_files
    unclear = [path for path in files if splits[path] is None]
    if unclear:
        raise UserError(
            f"{folder}: is {unclear[0].name} part of the split `{split}`? Its name doesn't tell"
            f"{', others do' if any(splits.values()) else ''}. Name a file or a glob in `path` instead."
        )
    chosen = [path for path, named in splits.items() if named and named.is_meant_by(split)]
    kinds = sorted({named.kind for path in chosen if (named := splits[path])})
    if not chosen:
        known = ", ".join(sorted({named.kind for named in splits.values() if named}))
        raise UserError(f"{folder}: there are no files of the split `{split}`. The names tell of: {known}.")
    if len(kinds) > 1 and split.lower() in _WORDS:
        kind = next(kind for kind in kinds if kind not in _WORDS)
        raise UserError(
            f"{folder}: the split `{split}` could be {' or '.join(f'`{kind}`' for kind in kinds)}, as the names of the "
            f"files tell. Write the one you mean under the source, such as `split: {kind}`, or name in `path` a file "
            "or a glob."
        )
    return chosen, skipped_files, metadata_files


def _below(folder: Path, path: Path) -> tuple[str, ...]:
    return path.relative_to(folder).parts


@dataclass(frozen=True, slots=True)
class _SplitName:
    """The split that a name tells: `train`, `train_sft` and `my_train_sft` of my_train_sft-00000-of-00002.parquet.

    Words before that of the split tell the topic of a file, those behind it the kind of split.
    """

    split: str
    kind: str
    whole: str

    def is_meant_by(self, split: str) -> bool:
        """Return True if a recipe's `split` is this one: `train` is any kind of it, `train_sft` that one alone."""
        wanted = split.lower()
        if wanted in _WORDS:
            return self.split == _WORDS[wanted]
        return re.sub("[-_. ]+", "_", wanted) in (self.kind, self.whole)


def _split_of(path: Path) -> _SplitName | None:
    """The split that a file's name tells, or else a folder's: `train` of train-00000-of-00002.parquet."""
    file = path.name.lower()
    file = file[: file.rindex(ending_of(path))]
    for name in [file, *reversed([part.lower() for part in path.parts[:-1]])]:
        words = [word for word in re.finditer("[a-z]+", name) if word[0] in _WORDS]
        if words:
            split, end = _WORDS[words[-1][0]], words[-1].end()
            kind = re.sub("[-_. ]+", "_", _SHARD.sub("", name[end:]))
            return _SplitName(split, split + kind, re.sub("[-_. ]+", "_", name[:end]) + kind)
    return None


def _saved(folder: Path, source: Source) -> OpenSource:
    """A folder that datasets' `save_to_disk` wrote."""
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
        return _dataset(saved[source.split], f"{folder}[{source.split}]")
    return _dataset(saved, str(folder))


def _hub(source: Source) -> OpenSource:
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as fault:  # of many libraries, and all of them about the id, the split, the login or the network
        tried = f"split `{source.split}`" + (f", configuration `{source.name}`" if source.name else "")
        tried += f", revision `{source.revision}`" if source.revision else ""
        here = describe_missing_path(Path(source.path)).rstrip(".")
        raise UserError(
            f"{source.path}: no file or folder here ({here}), and the Hugging Face hub didn't give a data set of that "
            f"name ({tried}): {type(fault).__name__}: {first_line(fault)}. Check the id, the split and the network; a "
            "private or gated one needs `hf auth login`."
        ) from fault
    return _dataset(loaded, f"{source.path}{f':{source.name}' if source.name else ''}[{source.split}]")


def _dataset(dataset: Any, name: str) -> OpenSource:
    if not len(dataset):
        raise UserError(f"{name}: the data set holds no rows.")
    # Arrow's own values: nothing is decoded, so images beside the text cost nothing and need no library.
    tables = dataset.with_format("arrow")
    return OpenSource(
        [name],
        lambda: ((0, chunk) for chunk in arrow_chunks(_batches(tables))),
        lambda: hash_files([Path(file["filename"]) for file in dataset.cache_files], [len(dataset)]),
    )


def _batches(tables: Any) -> Iterator[Any]:
    for table in tables.iter(ROWS_OF_A_CHUNK):
        yield from table.combine_chunks().to_batches()
