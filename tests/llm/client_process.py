"""Process for tests to kill: it asks for rows of four stages each, and writes the results."""

import asyncio
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from train.llm.client import Client
from train.llm.concurrency import Backoff
from train.llm.failures import RequestFailed
from train.llm.journal import Journal
from train.llm.ordered_map import map_ordered
from train.llm.progress import progress
from train.llm.request import Decoding, Request
from train.llm.server import Server

STAGES = 4


async def ask_rows(url: str, folder: Path, rows: int, concurrency: int, stages: int = STAGES) -> int:
    """Write out.jsonl: the answers of each row, where each stage asks with the answer of the stage before.

    Return the completion tokens of this run.
    """
    output = folder / "out.jsonl"
    with Journal(folder / "answers.sqlite") as journal, output.open("w", encoding="utf-8") as lines:
        async with Client([Server(url, concurrency)], "m", journal, backoff=Backoff(0.001, 0.01)) as client:

            async def work(row: int) -> list[str]:
                texts = [f"row {row}"]
                for stage in range(stages):
                    messages = [{"role": "user", "content": f"{stage}: {texts[-1]}"}]
                    try:
                        answer = await client.ask(Request(f"stage {stage}", messages, Decoding(max_tokens=9)))
                    except RequestFailed as failure:
                        return [*texts, f"failed: {failure}"]
                    texts.append(answer.text)
                return texts

            async with progress("rows", rows, client) as bar:
                async for texts in map_ordered(range(rows), work, at_once=2 * concurrency):
                    lines.write(json.dumps(texts) + "\n")
                    bar.advance()
            return client.counts.completion_tokens


def run(url: str, folder: Path, rows: int, concurrency: int, stages: int = STAGES) -> None:
    """Run as a process that ends like a command: with 130 after Ctrl-C and nothing on standard error."""
    errors = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(errors, 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    try:
        asyncio.run(ask_rows(url, folder, rows, concurrency, stages))
    except KeyboardInterrupt:
        sys.exit(130)


def peak_memory(url: str, folder: Path, rows: int, results: Any) -> None:
    """Ask for rows of one stage, and put the peak of the resident memory, in bytes, into `results`."""
    asyncio.run(ask_rows(url, folder, rows, 32, stages=1))
    results.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
