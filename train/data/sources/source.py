"""Sources: files, folders, globs, saved data sets and data sets of the hub, opened as chunks of rows.

All rows of a source have one format, detected from the first row. A folder whose files are named by split
(train-00000.parquet, data/test.jsonl) gives the files of the source's split; a glob gives all files that match.
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
from train.data.sources.metadata_files import STATE, describe_metadata_file, is_saved_dataset
from train.data.sources.readers import READERS, ROWS_PER_CHUNK, Chunk, LocatedRow, extension_of, first_line, read_file
from train.data.sources.row_errors import preview
from train.data.sources.unread_text import Unread, collect, find_lost_text
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
"""A shard number behind the name of a split: -00000-of-00002, -00000-of-00002-0123456789abcdef, _1, .part3."""
_EXAMPLES = 3
_TEXT_FILES = ("README", "LICENSE", "LICENCE", "NOTICE")
"""Stems of files beside the data that are skipped without a warning."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that can't be trained: its place, and what is wrong with it."""

    place: str
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: {self.detail}"


@dataclass(slots=True)
class BadRows:
    """The number of rows with one kind of error, and the first three of them."""

    count: int = 0
    examples: list[BadRow] = field(default_factory=list)

    def add(self, place: str, detail: str) -> None:
        """Count one more row."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(BadRow(place, detail))


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source that exists.

    - `files`: the names of its files: a row's place is one of these and the place in the file.
    - `chunks`: yields the number of a file and a chunk of it, for all chunks.
    - `digest`: a digest of every byte that the rows are read from, without names.
    - `skipped_files`: files of a folder whose names are not those of data, except READMEs and files with a leading dot.
    - `metadata_files`: files that describe the data, each with its kind.
    """

    files: list[str]
    chunks: Callable[[], Iterator[tuple[int, Chunk]]]
    digest: Callable[[], str]
    skipped_files: Sequence[Path] = ()
    metadata_files: Sequence[str] = ()


def open_source(source: Source, allow_pickle: bool = False) -> OpenSource:
    """Find the files or the data set of a source; no row is read yet.

    Raises UserError if it doesn't exist. Reading raises UserError for an unknown extension, an empty or broken file and
    a pickle that the recipe doesn't allow.
    """
    path = Path(source.path)
    if path.is_dir() and is_saved_dataset(path):
        return _open_saved(path, source)
    skipped_files: list[Path] = []
    metadata_files: dict[Path, str] = {}
    if path.is_dir():
        files, skipped_files, metadata_files = _find_files(path, source.split)
    elif path.exists():
        files = [path]
        if kind := describe_metadata_file(path):
            raise UserError(f"{source.path}: the file is {kind} and holds no rows. Name the file with the rows.")
    elif glob.has_magic(source.path):
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not files:
            raise UserError(f"{source.path}: no file matches this pattern in {Path.cwd()}.")
        files, metadata_files = _separate_metadata(files)
        if not files:
            raise UserError(f"{source.path}: no file of rows matches this pattern{_describe_metadata(metadata_files)}.")
    elif looks_like_hub_id(source.path):
        return _open_hub(source)
    else:
        raise UserError(f"{source.path}: {describe_missing_path(path)}")
    _refuse_hub_keys(source, files_have_splits=path.is_dir())
    return OpenSource(
        [_to_text(file) for file in files],
        lambda: ((number, chunk) for number, file in enumerate(files) for chunk in read_file(file, allow_pickle)),
        lambda: hash_files(files, [extension_of(file) for file in files]),
        skipped_files,
        [f"{_to_text(file)} ({kind})" for file, kind in metadata_files.items()],
    )


def _to_text(path: Path) -> str:
    """Return a path as text that UTF-8 can hold; names of files may be other bytes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def read_rows(source: Source, allow_pickle: bool = False) -> Iterator[LocatedRow]:
    """Yield each row of a source, or the error of a row that can't be parsed, with its full place. Raises UserError."""
    opened = open_source(source, allow_pickle)
    for number, chunk in opened.chunks():
        for place, row in chunk.rows():
            yield opened.files[number] + place, row


def read_conversations(source: Source, allow_pickle: bool = False) -> Iterator[tuple[str, Conversation | RowError]]:
    """Yield each row of a source as a conversation, or its error, with its full place.

    `weight` is not applied. Raises UserError.
    """
    opened = open_source(source, allow_pickle)
    chunks, format = chunks_and_format(source, opened)
    for number, chunk in chunks:
        for place, row in chunk.rows():
            full_place = opened.files[number] + place
            if isinstance(row, RowError):
                yield full_place, row
                continue
            try:
                yield full_place, _read_completely(row, format, place, source)
            except RowError as error:
                yield full_place, error


def _read_completely(row: RawRow, format: str, place: str, source: Source) -> Conversation:
    """Read a row for data generation. Raises RowError also if a text of the row would be left out."""
    unread: Unread = {}
    conversation = read_row(row, format, place, ignore=source.ignore, unread=unread)
    for name, value in (conversation.template_kwargs or {}).items():
        collect(unread, f"{TEMPLATE_KWARGS}.{name}", value)
    texts = [message["content"] for message in conversation.messages]
    for name, values in unread.items():
        if name not in source.ignore and (text := find_lost_text(name, values, texts)) is not None:
            remedy = f"rename it to what the format {format} reads, or write `ignore: [{name}]` under the source"
            raise RowError("text not read", f"`{name}` holds {preview(text)}: {remedy}")
    return conversation


def count_rows(source: Source, allow_pickle: bool = False) -> int:
    """Return the number of rows of a source, bad ones included. Raises UserError."""
    return sum(len(chunk) for _, chunk in open_source(source, allow_pickle).chunks())


def chunks_and_format(
    source: Source,
    opened: OpenSource,
    as_read: Callable[[RawRow], RawRow] = lambda row: row,
    detect_format: Callable[[Iterable[str]], str] = detect,
) -> tuple[Iterator[tuple[int, Chunk]], str]:
    """Return the chunks of a source and its format: the source's own, or that of the first row, mapped by `as_read`.

    `detect_format`: columns -> their format. Raises UserError.
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
                return chain(seen, chunks), detect_format(as_read(without(row, source.ignore, {})))
            except UserError as error:
                raise UserError(f"{opened.files[file]}{place}: {error}") from error
    return iter(seen), "messages"  # no row can be read; their errors say why


def _refuse_hub_keys(source: Source, files_have_splits: bool) -> None:
    """Raise UserError for keys of hub data sets that would be ignored."""
    given = [key for key in ("name", "revision") if getattr(source, key) is not None]
    if source.split != "train" and not files_have_splits:
        given.append("split")
    if given:
        raise UserError(
            f"{source.path}: `{given[0]}: {getattr(source, given[0])}` has no meaning for local files. Remove it, or "
            "name the file itself in `path`."
        )


def _separate_metadata(files: Iterable[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Return the files with rows, and the metadata files with their kinds."""
    metadata_files = {path: kind for path in files if (kind := describe_metadata_file(path))}
    return [path for path in files if path not in metadata_files], metadata_files


def _describe_metadata(metadata_files: Mapping[Path, str]) -> str:
    files = ", ".join(f"{path.name} ({kind})" for path, kind in islice(metadata_files.items(), _EXAMPLES))
    return f", only metadata: {files}" if metadata_files else ""


def _find_files(folder: Path, split: str) -> tuple[list[Path], list[Path], dict[Path, str]]:
    """Return the data files of a split below a folder, other files, and metadata files with their kinds.

    Files that are not named by split are all files of `train`. Raises UserError if there are none, or if it is unclear
    which ones are meant.
    """
    paths = sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/**/*", recursive=True)))  # follows links to folders
    visible = [path for path in paths if path.is_file() and not _has_part(folder, path, ".")]
    files = [path for path in visible if extension_of(path) in READERS and not _has_part(folder, path, "_")]
    skipped_files = [path for path in visible if path not in set(files) and path.stem.upper() not in _TEXT_FILES]
    files, metadata_files = _separate_metadata(files)
    if not files:
        saved = [str(path.parent) for path, kind in metadata_files.items() if kind == STATE]
        hint = f" To read what save_to_disk wrote, name {saved[0]}." if saved else ""
        raise UserError(
            f"{folder}: no data file in this folder{_describe_metadata(metadata_files)}. Extensions of data files are "
            f"{', '.join(READERS)}.{hint}"
        )
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    if not any(splits.values()) and split == "train":
        return files, skipped_files, metadata_files
    unclear = [path for path in files if splits[path] is None]
    if unclear:
        raise UserError(
            f"{folder}: is {unclear[0].name} part of the split `{split}`? Its name names no split"
            f"{', while others do' if any(splits.values()) else ''}. Name a file or a glob in `path` instead."
        )
    chosen = [path for path, name in splits.items() if name and name.matches(split)]
    kinds = sorted({name.kind for path in chosen if (name := splits[path])})
    if not chosen:
        existing = ", ".join(sorted({name.kind for name in splits.values() if name}))
        raise UserError(
            f"{folder}: there are no files of the split `{split}`. The splits in the names are: {existing}."
        )
    if len(kinds) > 1 and split.lower() in _WORDS:
        kind = next(kind for kind in kinds if kind not in _WORDS)
        raise UserError(
            f"{folder}: by the names of the files, the split `{split}` could be "
            f"{' or '.join(f'`{kind}`' for kind in kinds)}. Write one of them under the source, such as "
            f"`split: {kind}`, or name a file or a glob in `path`."
        )
    return chosen, skipped_files, metadata_files


def _has_part(folder: Path, path: Path, prefix: str) -> bool:
    """Return whether a part of the path below `folder` begins with `prefix`."""
    return any(part[0] == prefix for part in path.relative_to(folder).parts)


@dataclass(frozen=True, slots=True)
class _SplitName:
    """The split in a file's name: `train`, `train_sft` and `my_train_sft` of my_train_sft-00000-of-00002.parquet.

    Words before that of the split are the topic of the file, those behind it the kind of split.
    """

    split: str
    kind: str
    full: str

    def matches(self, split: str) -> bool:
        """Return whether a recipe's `split` is this one: `train` is any kind of it, `train_sft` that one alone."""
        name = split.lower()
        if name in _WORDS:
            return self.split == _WORDS[name]
        return re.sub("[-_. ]+", "_", name) in (self.kind, self.full)


def _split_of(path: Path) -> _SplitName | None:
    """Return the split in a file's name, or else in a folder's: `train` of train-00000-of-00002.parquet."""
    file = path.name.lower()
    file = file[: file.rindex(extension_of(path))]
    for name in [file, *reversed([part.lower() for part in path.parts[:-1]])]:
        words = [word for word in re.finditer("[a-z]+", name) if word[0] in _WORDS]
        if words:
            split, end = _WORDS[words[-1][0]], words[-1].end()
            kind = re.sub("[-_. ]+", "_", _SHARD.sub("", name[end:]))
            return _SplitName(split, split + kind, re.sub("[-_. ]+", "_", name[:end]) + kind)
    return None


def _open_saved(folder: Path, source: Source) -> OpenSource:
    """Open a folder that datasets' `save_to_disk` wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # any error of an incomplete folder
        raise UserError(f"{folder}: the saved data set can't be opened: {first_line(error)}.") from error
    splits = isinstance(saved, datasets.DatasetDict)
    _refuse_hub_keys(source, files_have_splits=splits)
    if splits and source.split not in saved:
        raise UserError(f"{folder}: there is no split `{source.split}`. It has: {', '.join(saved)}.")
    if splits:
        return _open_dataset(saved[source.split], f"{folder}[{source.split}]")
    return _open_dataset(saved, str(folder))


def _open_hub(source: Source) -> OpenSource:
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # of many libraries: about the id, the split, the login or the network
        request = f"split `{source.split}`" + (f", configuration `{source.name}`" if source.name else "")
        request += f", revision `{source.revision}`" if source.revision else ""
        here = describe_missing_path(Path(source.path)).rstrip(".")
        raise UserError(
            f"{source.path}: no such file or folder ({here}), and the Hugging Face hub has no such data set or can't "
            f"be reached ({request}): {type(error).__name__}: {first_line(error)}. Check the id, the split and the "
            "network; a private or gated one needs `hf auth login`."
        ) from error
    return _open_dataset(loaded, f"{source.path}{f':{source.name}' if source.name else ''}[{source.split}]")


def _open_dataset(dataset: Any, name: str) -> OpenSource:
    if not len(dataset):
        raise UserError(f"{name}: the data set holds no rows.")
    # In Arrow format nothing is decoded, so images beside the text cost nothing and need no library.
    tables = dataset.with_format("arrow")
    return OpenSource(
        [name],
        lambda: ((0, chunk) for chunk in arrow_chunks(_batches(tables))),
        lambda: hash_files([Path(file["filename"]) for file in dataset.cache_files], [len(dataset)]),
    )


def _batches(tables: Any) -> Iterator[Any]:
    for table in tables.iter(ROWS_PER_CHUNK):
        yield from table.combine_chunks().to_batches()
