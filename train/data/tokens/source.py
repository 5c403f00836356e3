"""Tokens of one source, cached: tokenized once by one process, found by all others and at the next start.

The cache key follows from the bytes of the source, the tokenizer, the template, the policies of `chat` and the cache's
version; not from what the recipe does with the rows afterwards, nor from the path of the source.
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
from train.data.chat.rendering import ShortcutError
from train.data.chat.template import date_of
from train.data.sources.formats import detect, select_read_names
from train.data.sources.loss_weights import LOSS_WEIGHT
from train.data.sources.pairs import PREFERENCE, detect_with_pairs
from train.data.sources.source import OpenSource, chunks_and_format, open_source
from train.data.tokens.preference import PreferenceTokenizer
from train.data.tokens.table import RowIssues, TokensDigest, write_table
from train.data.tokens.workers import RowTokenizer, tokenize
from train.errors import UserError
from train.progress import ProgressBar, progress_bar
from train.recipe import Recipe, Source

ROWS = "rows.arrow"
"""The file of a cache entry that holds a token table."""
_SECONDS_BETWEEN_REPORTS = 1.0


def cache_folder(recipe: Recipe) -> Path:
    """Return the folder that holds tokens and packing plans."""
    return Path(recipe.data.cache_dir) if recipe.data.cache_dir else default_folder()


def tokenize_source(
    key: str, source: Source, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[Entry, OpenSource]:
    """Return the cache entry with the tokens of one source; tokenize it if there is none.

    Raises UserError, naming `key`, if the source can't be read.
    """
    try:
        opened = open_source(source, recipe.data.allow_pickle)
        with progress_bar(f"tokenizing {source.path}", unit="rows") as bar:
            fingerprint = _fingerprint(source, opened, recipe, tokenizer)

            def build(folder: Path) -> dict[str, Any]:
                return _write(folder, source, opened, fingerprint["rows"], recipe, tokenizer, bar)

            entry = get_or_build(cache_folder(recipe), cache_key(fingerprint), build, bar)
            if _lacks_loss_weights(entry):
                key = cache_key({**fingerprint, "loss_weights": True})
                entry = get_or_build(cache_folder(recipe), key, build, bar)
            return entry, opened
    except UserError as error:
        names_key = str(error).startswith(("data.", "chat."))
        raise UserError(str(error) if names_key else f"{key}: {error}") from error


def _fingerprint(
    source: Source, opened: OpenSource, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return all that decides which tokens a source becomes."""
    chat = recipe.chat
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    return {
        "rows": opened.digest(),
        "format": source.format,
        "ignored": select_read_names(source.ignore),  # the other names are only reported and change no token
        "tokenizer": xxhash.xxh3_128(backend.encode()).hexdigest(),
        "special_tokens": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "date": date_of(tokenizer),
        "policies": [chat.train_on, chat.control_tokens_in_text],
        "packages": [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")],
        **({"preference": True} if recipe.preference else {}),
    }


def _lacks_loss_weights(entry: Entry) -> bool:
    """Return whether an earlier version, for which loss weights were a column unread or errors, made an entry of them.

    The rest of its entries are as they would be now.
    """
    unread, errors = entry.facts["unread"], entry.facts["errors"]
    return "loss_weights" not in entry.facts and (LOSS_WEIGHT in unread or "wrong type" in errors)


def _write(
    folder: Path,
    source: Source,
    opened: OpenSource,
    digest: str,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    bar: ProgressBar,
) -> dict[str, Any]:
    """Tokenize a source, whose digest is given, into `folder` and return the facts for the manifest."""
    chat = recipe.chat
    why_not_fast = ""
    for fast in (True, False):
        chunks, format = chunks_and_format(
            source, opened, detect_format=detect_with_pairs if recipe.preference else detect
        )
        kind = PreferenceTokenizer if recipe.preference else RowTokenizer
        train_on = "last" if recipe.preference and format != PREFERENCE else chat.train_on
        rows = kind(tokenizer, train_on, chat.control_tokens_in_text, fast=fast, ignore=source.ignore)
        try:
            counter = _BatchCounter(tokenize(rows, chunks, format, recipe.data.processes), folder, bar)
            write_table(folder / ROWS, counter)
        except ShortcutError as error:
            why_not_fast = str(error)
            bar.advance(-bar.done)
        else:
            break
    if opened.digest() != digest:
        raise UserError(f"{source.path} changed while it was read. Start again when it is complete.")
    why_not_fast = why_not_fast or rows.encoder.why_not_fast
    return {
        "source": source.path,
        "rows": counter.rows,
        "tokens": counter.digest.facts(),
        "loss_weights": counter.digest.has_loss_weights,
        "errors": counter.issues.errors,
        "escaped": counter.issues.escaped,
        "unread": counter.issues.unread,
        "tokenizer": f"the tokenizer itself, as {why_not_fast}" if why_not_fast else "fastokens, checked on a sample",
    }


class _BatchCounter:
    """An iterator over batches that counts rows, issues and tokens and reports the progress."""

    def __init__(
        self, batches: Iterator[tuple[pyarrow.RecordBatch, RowIssues]], folder: Path, bar: ProgressBar
    ) -> None:
        self._batches, self._folder, self._bar = batches, folder, bar
        self.rows, self.issues, self.digest = 0, RowIssues(), TokensDigest()

    def __iter__(self) -> Iterator[pyarrow.RecordBatch]:
        last_report = time.monotonic()
        for batch, issues in self._batches:
            self.issues.merge(issues)
            self.rows += batch.num_rows
            self.digest.add(batch)
            self._bar.advance(batch.num_rows)
            if time.monotonic() - last_report > _SECONDS_BETWEEN_REPORTS:
                last_report = time.monotonic()
                report_progress(self._folder, self._bar.done)
            yield batch
