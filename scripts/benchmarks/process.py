"""Processes of benchmarks: start one, end it with its children, and find out why it failed."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

PROJECT = Path(__file__).parents[2]


def script_command(name: str, argument: str) -> list[str]:
    """Return the command that runs a file of this folder with one argument, in the environment of `running`."""
    return [sys.executable, "-m", f"benchmarks.{name}", argument]


@contextmanager
def running(
    command: Sequence[str], log: TextIO, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with these additions to the environment, its output in `log`.

    An exception in the block ends it with its children; otherwise the end of the block waits for it.
    """
    paths = (str(PROJECT), str(PROJECT / "scripts"), os.environ.get("PYTHONPATH", ""))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environment or {})}
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables) as child:
        try:
            yield child
        except BaseException:
            end(child)
            raise


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started (workers, compilers), which would outlive it."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(child.pid)
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def read_lines(log: TextIO) -> list[str]:
    """Return the lines of a log that are not empty."""
    log.seek(0)
    return [line for line in log.read().splitlines() if line.strip()]


def failure_reason(log: TextIO, exit_code: int) -> str:
    """Return why a process failed: its `error:`, its last exception, its last line, or its exit code.

    Warnings at its exit may follow the reason; of an exception's lines the first is the most telling.
    """
    lines = read_lines(log)
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if tracebacks := [index for index, line in enumerate(lines) if line.startswith("Traceback (most recent call")]:
        exceptions = [line for line in lines[tracebacks[-1] + 1 :] if not line.startswith(" ")]
        lines = exceptions[:1] or lines
    reason = lines[-1] if lines else f"exit code {exit_code}"
    _, out_of_memory, detail = reason.partition("OutOfMemoryError: ")
    if out_of_memory:
        return f"out of memory: {detail}"
    return f"ended by signal {-exit_code}; last line: {reason}" if exit_code < 0 and lines else reason
