"""Parallel tokenization: chunks of rows -> tokens and trained spans, on all cores, in bounded memory."""

import gc
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TypeVar

import pyarrow
from transformers import PreTrainedTokenizerBase

from train.data.chat.assistant_spans import TrainOn
from train.data.chat.control_tokens import ControlTokens, Policy
from train.data.loss_mask import EncodedRow, Encoder
from train.data.sources.formats import TEMPLATE_KWARGS, Conversation, RowError, read_row
from train.data.sources.readers import Chunk
from train.data.sources.unread_text import Unread
from train.data.tokens.table import RowIssues, make_batch
from train.errors import UserError

Read = TypeVar("Read")
_CHUNKS_AHEAD = 2
"""Chunks in flight for each process: the one that it works on, and the next."""


class RowTokenizer:
    """Rows -> tokens under the template that the tokenizer has now and the policies of `chat`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: TrainOn,
        control_tokens_in_text: Policy = "error",
        *,
        fast: bool = False,
        ignore: Collection[str] = (),
    ) -> None:
        """Probe the template. `ignore`: columns and message keys that are read as if the rows had none of them.

        Raises UserError if no answer can be trained under the template.
        """
        self.encoder = Encoder(tokenizer, fast=fast)
        self._control_tokens = ControlTokens(tokenizer, control_tokens_in_text)
        self._train_on: TrainOn = train_on
        self.ignore = ignore
        self.escaped: list[bool] = []  # for each conversation encoded last
        self.left_out: list[Unread] = []  # by the template, for each conversation encoded last

    def encode(self, conversations: Sequence[Conversation]) -> list[list[EncodedRow] | RowError]:
        """Return for each conversation its rows, or the error for which it can't be trained.

        A conversation has several rows where the template rewrites earlier turns.
        Raises ShortcutError as `Encoder.encode` does.
        """
        cleaned = [self._clean(conversation) for conversation in conversations]
        self.escaped = [
            not isinstance(clean, RowError) and clean is not conversation
            for clean, conversation in zip(cleaned, conversations, strict=True)
        ]
        clean = [conversation for conversation in cleaned if not isinstance(conversation, RowError)]
        encoded = iter(
            self.encoder.encode(
                [(conversation.messages, conversation.tools) for conversation in clean],
                self._train_on,
                [conversation.template_kwargs for conversation in clean],
            )
        )
        left_out = iter(self.encoder.left_out)
        self.left_out = [{} if isinstance(conversation, RowError) else next(left_out) for conversation in cleaned]
        return [conversation if isinstance(conversation, RowError) else next(encoded) for conversation in cleaned]

    def _clean(self, conversation: Conversation) -> Conversation | RowError:
        try:
            messages = self._control_tokens.clean(conversation.messages)
            tools = self._control_tokens.clean_value(conversation.tools, "the tools")
            kwargs = self._control_tokens.clean_value(conversation.template_kwargs, TEMPLATE_KWARGS)
        except RowError as error:
            return error
        if messages is conversation.messages and (tools, kwargs) == (conversation.tools, conversation.template_kwargs):
            return conversation
        return replace(conversation, messages=messages, tools=tools, template_kwargs=kwargs)

    def encode_chunk(self, file: int, chunk: Chunk, format: str) -> tuple[pyarrow.RecordBatch, RowIssues]:
        """Return the rows of a chunk as a batch of the token table, and its issues. `file`: the file's number."""
        encoded, issues = self.encode_rows(file, chunk, format)
        return make_batch(file, encoded), issues

    def read_rows(
        self, file: int, chunk: Chunk, issues: RowIssues, read: Callable[..., Read]
    ) -> Iterator[tuple[Read, Unread]]:
        """Yield what `read` makes of each row of a chunk, with the values that it did not read.

        `issues`: counts the rows for which it raises RowError. `read`: takes a row, and `place`, `ignore`, `unread` by
        name.
        """
        for place, row in chunk.rows():
            try:
                if isinstance(row, RowError):
                    raise row
                unread: Unread = {}
                yield read(row, place=place, ignore=self.ignore, unread=unread), unread
            except RowError as error:
                issues.add(error, file, place)

    def encode_rows(
        self, file: int, chunk: Chunk, format: str
    ) -> tuple[list[tuple[Conversation, list[EncodedRow]]], RowIssues]:
        """Return the conversations of a chunk that can be trained, each with its rows, and the issues of the chunk."""
        issues = RowIssues()
        read = [*self.read_rows(file, chunk, issues, partial(read_row, format=format))]
        conversations, unread = [conversation for conversation, _ in read], [values for _, values in read]
        encoded: list[tuple[Conversation, list[EncodedRow]]] = []
        results = self.encode(conversations)
        issues.escaped = sum(self.escaped)
        for conversation, rows, unread_of_row, left_out in zip(
            conversations, results, unread, self.left_out, strict=True
        ):
            if isinstance(rows, RowError):
                issues.add(rows, file, conversation.place)
            else:
                encoded.append((conversation, rows))
                if unread_of_row or left_out:
                    issues.add_unread(unread_of_row | left_out, conversation.messages, file, conversation.place)
        return encoded, issues


def tokenize(
    rows: RowTokenizer, chunks: Iterable[tuple[int, Chunk]], format: str, processes: int | None = None
) -> Iterator[tuple[pyarrow.RecordBatch, RowIssues]]:
    """Yield the batch and the issues of each chunk, in order.

    `processes`: None means one for each core that this process may use.
    Raises UserError if a worker dies, ShortcutError as `RowTokenizer.encode` does.
    """
    processes = processes or available_cores()
    remaining = iter(chunks)
    first = list(islice(remaining, processes))
    processes = min(processes, len(first))
    if processes <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from (rows.encode_chunk(file, chunk, format) for file, chunk in chain(first, remaining))
        return
    pending: deque[Future[tuple[pyarrow.RecordBatch, RowIssues]]] = deque()
    # Forked workers have the tokenizer and the probed template at once. They share the memory of both as long as no
    # garbage collection writes to it.
    gc.freeze()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _start_worker, (rows,)) as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        try:
            for file, chunk in chain(first, remaining):
                pending.append(pool.submit(_encode_chunk, file, chunk, format))
                if len(pending) >= processes * _CHUNKS_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "data: a process that tokenized rows was killed; often the memory ran out. Give the job more "
                f"memory, or fewer processes than these {processes}: `data.processes: {max(processes // 2, 1)}`."
            ) from error
        finally:
            gc.unfreeze()
            pool.shutdown(wait=False, cancel_futures=True)


def available_cores() -> int:
    """Return the number of cores that this process may use, which Slurm and containers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker_tokenizer: RowTokenizer
"""The tokenizer of a worker process."""


def _start_worker(rows: RowTokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = rows
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent ends: after a kill it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_chunk(file: int, chunk: Chunk, format: str) -> tuple[pyarrow.RecordBatch, RowIssues]:
    return _worker_tokenizer.encode_chunk(file, chunk, format)
