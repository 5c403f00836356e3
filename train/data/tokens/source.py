"""The tokens of one source on disk: made once, by one process, and found again by all others and at the next start.

The key follows from the bytes of the source, the tokenizer, the template, the policies of `chat` and the code that all
went through; not from what the recipe does with the rows afterwards, nor from where the source stands.
"""

import importlib.metadata
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import xxhash
from transformers import PreTrainedTokenizerBase

from train.data.cache import Entry, cache_key, default_folder, get_or_build, report_progress
from train.data.chat.template import date_of
from train.data.fast_tokenizer import DiffersError
from train.data.sources.formats import ignored_when_read
from train.data.sources.source import OpenSource, chunks_and_format, open_source
from train.data.tokens.table import RowIssues, TokensDigest, write
from train.data.tokens.workers import RowTokenizer, tokenize
from train.errors import UserError
from train.progress import ProgressBar, progress_bar
from train.recipe import Recipe, Source

ROWS = "rows.arrow"
"""The file of an entry, as `token_rows` has it."""

_DECISIVE = (
    *("arrow_rows", "chat_template", "companions", "control_tokens", "fast_tokenizer", "files", "formats", "layouts"),
    *(
        "loss_mask",
        "rendering",
        "row_faults",
        "tokenize_source",
        "sources",
        "spans",
        "token_rows",
        "tokenize",
        "probe_conversations",
    ),
    *("turns", "unread"),
)
"""The modules that decide which tokens a row becomes: where one changes, rows are tokenized anew."""
_SECONDS_BETWEEN_REPORTS = 1.0


def cache_folder(recipe: Recipe) -> Path:
    """Where tokens and plans are kept."""
    return Path(recipe.data.cache_dir).expanduser() if recipe.data.cache_dir else default_folder()


def tokenize_source(
    key: str, source: Source, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[Entry, OpenSource]:
    """The tokens of one source on disk, made now if they aren't there. Raises UserError, naming `key`."""
    try:
        opened = open_source(source, recipe.data.allow_pickle)
        with progress_bar(f"tokenizing {source.path}", unit="rows") as tokenizing:
            made_of = _made_of(source, opened, recipe, tokenizer)
            return get_or_build(
                cache_folder(recipe),
                cache_key(made_of),
                lambda partial: _write(partial, source, opened, made_of["rows"], recipe, tokenizer, tokenizing),
                tokenizing,
            ), opened
    except UserError as fault:
        named = str(fault).startswith(("data.", "chat."))  # another key is at fault
        raise UserError(str(fault) if named else f"{key}: {fault}") from fault


def _made_of(source: Source, opened: OpenSource, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides what tokens a source becomes."""
    chat = recipe.chat
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    return {
        "rows": opened.digest(),
        "format": source.format,
        "ignored": ignored_when_read(source.ignore),  # the others are told, and change no token
        "tokenizer": xxhash.xxh3_128(backend.encode()).hexdigest(),
        "special_tokens": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "date": date_of(tokenizer),
        "policies": [chat.train_on, chat.control_tokens_in_text],
        "packages": [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }


def _write(
    folder: Path,
    source: Source,
    opened: OpenSource,
    digest: str,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    tokenizing: ProgressBar,
) -> dict[str, Any]:
    """Tokenize a source, which has this digest, into `folder`; what its manifest is to say. Raises UserError."""
    chat = recipe.chat
    why_not_fast = ""
    for fast in (True, False):
        rows = RowTokenizer(tokenizer, chat.train_on, chat.control_tokens_in_text, fast=fast, ignore=source.ignore)
        try:
            chunks, format = chunks_and_format(source, opened)
            batches = tokenize(rows, chunks, format, recipe.data.processes)
            counted = _Counted(batches, folder, tokenizing)
            write(folder / ROWS, counted)
        except DiffersError as fault:
            why_not_fast = f"fastokens gives other tokens for {fault}"
            tokenizing.advance(-tokenizing.done)
        else:
            break
    if opened.digest() != digest:
        raise UserError(f"{source.path} changed while it was read. Start again when it is whole.")
    why_not_fast = why_not_fast or rows.encoder.why_not_fast
    return {
        "source": source.path,
        "rows": counted.rows,
        "tokens": counted.digest.facts(),
        "errors": counted.faults.kinds,
        "escaped": counted.faults.escaped,
        "unread": counted.faults.unread,
        "tokenizer": f"the tokenizer itself, as {why_not_fast}" if why_not_fast else "fastokens, checked on a sample",
    }


class _Counted:
    """The batches as they pass, and what they hold in all."""

    def __init__(
        self, batches: Iterator[tuple[pyarrow.RecordBatch, RowIssues]], folder: Path, tokenizing: ProgressBar
    ) -> None:
        self._batches, self._folder, self._job = batches, folder, tokenizing
        self.rows, self.faults, self.digest = 0, RowIssues(), TokensDigest()

    def __iter__(self) -> Iterator[pyarrow.RecordBatch]:
        reported = time.monotonic()
        for batch, faults in self._batches:
            self.faults.merge(faults)
            self.rows += batch.num_rows
            self.digest.add(batch)
            self._job.advance(batch.num_rows)
            if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                report_progress(self._folder, self._job.done)
            yield batch
