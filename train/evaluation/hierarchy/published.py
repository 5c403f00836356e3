"""Rows of the published sets of SystemCheck (arXiv 2502.12197): files by subset, in a folder or on the hub."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from train.data.sources.formats import RowError
from train.data.sources.source import read_rows
from train.errors import UserError
from train.recipe import Source
from train.storage.jsonl_rows import check_row
from train.storage.local_paths import describe_missing_path, looks_like_hub_id

Row = TypeVar("Row", bound=BaseModel)
Message = dict[str, Any]


class PublishedMessage(BaseModel):
    """A message of a published row. Other keys (`tool_calls`, `name`) are passed to the template as they are."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None


def find_subsets(option: str, path: str, subsets: Sequence[str], *, hub: bool) -> dict[str, Source]:
    """Return the source of each subset: its file in the folder `path`, or its configuration of the hub id `path`.

    `hub`: the set is on the hub. Raises UserError, which begins with `option`, if there is no such folder or file.
    """
    folder = Path(path)
    names = [f"{subset}.jsonl" for subset in subsets]
    if folder.is_dir():
        files = {}
        for subset, name in zip(subsets, names, strict=True):
            existing = [folder / f"{name}{end}" for end in ("", ".gz") if (folder / f"{name}{end}").is_file()]
            if not existing:
                raise UserError(f"{option} {path}: there is no {name} in it. Needed: {', '.join(names)}.")
            files[subset] = Source(path=str(existing[0]))
        return files
    if folder.exists():
        raise UserError(f"{option} {path}: that is a file. Name the folder with {', '.join(names)}.")
    if hub and looks_like_hub_id(path):
        return {subset: Source(path=path, name=subset) for subset in subsets}
    raise UserError(f"{option} {path}: there is no such folder: {describe_missing_path(folder)}")


def read_subset(option: str, source: Source, model: type[Row], contents: str) -> Iterator[tuple[str, Any, Row]]:
    """Yield the place, the raw row and the checked row of each row. `contents`: a sentence on its keys, for errors.

    Raises UserError that names the place and the key of the first unusable row.
    """
    for place, raw in read_rows(source):
        if isinstance(raw, RowError):
            raise UserError(f"{option} {place}: {raw}. {contents}")
        yield place, raw, check_row(f"{option} {place}", raw, model, contents)


def messages_of(option: str, place: str, raw: Any) -> tuple[Message, ...]:
    """Return the messages of a raw row as they are, without keys that are null: files of the hub have every key.

    Raises UserError if the last message is not the user's or a tool's.
    """
    messages: list[Message] = [
        {"content": "", **{key: value for key, value in message.items() if value is not None}}
        for message in raw["messages"]
    ]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = f"ends with the role {messages[-1]['role']}" if messages else "is empty"
        raise UserError(f"{option} {place}: `messages` {last}. It must end with the turn that the model answers.")
    return tuple(messages)


def system_of(messages: Iterable[Message]) -> str:
    """Return the system message of a row: rows that share it are one piece of evidence."""
    return "\n\n".join(str(message["content"]) for message in messages if message["role"] == "system")
