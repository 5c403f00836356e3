"""Rows -> conversations -> tokens and spans: by chunks, on all cores, in memory that doesn't grow with the rows."""

import gc
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import chain, islice

import pyarrow
from transformers import PreTrainedTokenizerBase

from train.data.chat.assistant_spans import TrainOn
from train.data.chat.control_tokens import ControlTokens, Policy
from train.data.loss_mask import EncodedRow, Encoder
from train.data.sources.formats import Conversation, RowError, read_row
from train.data.sources.readers import Chunk
from train.data.sources.unread_text import Unread
from train.data.tokens.table import RowIssues, batch_of
from train.errors import UserError

_CHUNKS_AHEAD = 2
"""For each process: one that it works on, and one that waits for it."""


class RowTokenizer:
    """One recipe's way from rows to tokens: the template that the tokenizer has now, and the policies of `chat`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: TrainOn,
        control_tokens_in_text: Policy = "error",
        *,
        fast: bool = False,
        ignore: Collection[str] = (),
    ) -> None:
        """Learn what the template does. Raises UserError where no answer can be trained under it at all.

        `ignore`: columns and keys of messages that are read as if the rows had none of them.
        """
        self.encoder = Encoder(tokenizer, fast=fast)
        self._control_tokens = ControlTokens(tokenizer, control_tokens_in_text)
        self._train_on: TrainOn = train_on
        self._ignore = ignore
        self._escaped = 0  # conversations, since the chunk began
        self._left_out: list[Unread] = []  # by the template, of each conversation encoded last

    def encode(self, conversations: Sequence[Conversation]) -> list[list[EncodedRow] | RowError]:
        """Each conversation's rows in its order, or the fault that keeps it from being trained.

        Mostly one row; several where the template rewrites earlier turns, so that each needs a render of its own.
        Raises DiffersError where fastokens turns out to give other tokens.
        """
        cleaned = [self._cleaned(conversation) for conversation in conversations]
        clean = [conversation for conversation in cleaned if not isinstance(conversation, RowError)]
        encoded = iter(
            self.encoder.encode(
                [(conversation.messages, conversation.tools) for conversation in clean],
                self._train_on,
                [conversation.template_kwargs for conversation in clean],
            )
        )
        left_out = iter(self.encoder.left_out)
        self._left_out = [{} if isinstance(conversation, RowError) else next(left_out) for conversation in cleaned]
        return [conversation if isinstance(conversation, RowError) else next(encoded) for conversation in cleaned]

    def _cleaned(self, conversation: Conversation) -> Conversation | RowError:
        try:
            messages = self._control_tokens.clean(conversation.messages)
            tools = self._control_tokens.clean_tools(conversation.tools)
            kwargs = self._control_tokens.clean_kwargs(conversation.template_kwargs)
        except RowError as fault:
            return fault
        if messages is conversation.messages and (tools, kwargs) == (conversation.tools, conversation.template_kwargs):
            return conversation
        self._escaped += 1
        return replace(conversation, messages=messages, tools=tools, template_kwargs=kwargs)

    def encode_chunk(self, file: int, chunk: Chunk, format: str) -> tuple[pyarrow.RecordBatch, RowIssues]:
        """The rows of a chunk as they are stored, and what was wrong with the others. `file`: its number."""
        conversations: list[Conversation] = []
        unread: list[Unread] = []
        faults = RowIssues()
        for place, row in chunk.rows():
            try:
                if isinstance(row, RowError):
                    raise row
                of_row: Unread = {}
                conversations.append(read_row(row, format, place, ignore=self._ignore, unread=of_row))
                unread.append(of_row)
            except RowError as fault:
                faults.add(fault, file, place)
        good: list[tuple[Conversation, list[EncodedRow]]] = []
        self._escaped = 0
        results = self.encode(conversations)
        faults.escaped = self._escaped
        for conversation, result, of_row, left_out in zip(conversations, results, unread, self._left_out, strict=True):
            if isinstance(result, RowError):
                faults.add(result, file, conversation.place)
            else:
                good.append((conversation, result))
                if of_row or left_out:
                    faults.add_unread(of_row | left_out, conversation.messages, file, conversation.place)
        return batch_of(file, good), faults


def tokenize(
    rows: RowTokenizer, chunks: Iterable[tuple[int, Chunk]], format: str, processes: int | None = None
) -> Iterator[tuple[pyarrow.RecordBatch, RowIssues]]:
    """Each chunk encoded, in order. `processes`: None = as many as this process may use cores.

    Raises UserError where a worker dies, DiffersError as `RowTokenizer.encode`.
    """
    processes = processes or available_cores()
    remaining = iter(chunks)
    first = list(islice(remaining, processes))
    processes = min(processes, len(first))
    if processes <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from (rows.encode_chunk(file, chunk, format) for file, chunk in chain(first, remaining))
        return
    waiting: deque[Future[tuple[pyarrow.RecordBatch, RowIssues]]] = deque()
    # Forked, workers have the tokenizer and the probed template at once, and share the memory of both as long as no
    # garbage collection writes into it.
    gc.freeze()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _start_worker, (rows,)) as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        try:
            for file, chunk in chain(first, remaining):
                waiting.append(pool.submit(_work, file, chunk, format))
                if len(waiting) >= processes * _CHUNKS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as fault:
            raise UserError(
                "data: a process that tokenized rows was killed, as happens where memory runs out. Give the job more "
                f"memory, or fewer processes than these {processes}: `data.processes: {max(processes // 2, 1)}`."
            ) from fault
        finally:
            gc.unfreeze()
            pool.shutdown(wait=False, cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use: Slurm and containers may give it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_rows_of_worker: RowTokenizer
"""In a worker process: what it encodes with."""


def _start_worker(rows: RowTokenizer) -> None:
    global _rows_of_worker
    _rows_of_worker = rows
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers of a parent that was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(file: int, chunk: Chunk, format: str) -> tuple[pyarrow.RecordBatch, RowIssues]:
    return _rows_of_worker.encode_chunk(file, chunk, format)
