"""A contender of scripts/benchmark.py in a process of its own: started afresh, ended on every path, its words kept."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

SCRIPTS = Path(__file__).parents[1]


@contextmanager
def running(
    script: str, argument: str, log: TextIO, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a file of this folder with one argument; all that it says goes into `log`. An exception ends it, with its
    children; otherwise the end of the block waits for it."""
    command = [sys.executable, "-m", f"benchmarks.{script}", argument]
    environment = environment or os.environ
    path = os.pathsep.join(filter(None, [str(SCRIPTS), environment.get("PYTHONPATH")]))
    with subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env={**environment, "PYTHONPATH": path}
    ) as child:
        try:
            yield child
        except BaseException:
            end(child)
            raise


def end(child: subprocess.Popen[bytes]) -> None:
    """Stop it and the processes that it started (workers, compilers): a killed parent leaves them running."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(child.pid)
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def words(log: TextIO) -> list[str]:
    """The lines that it wrote, without empty ones."""
    log.seek(0)
    return [line for line in log.read().splitlines() if line.strip()]


def last_words(log: TextIO, exit_code: int) -> str:
    """Why it failed: its `error:`, or what its last traceback ends in, or its last line, or else its exit code.

    Warnings as it ends may follow the reason, and an exception may have several lines, of which the first says most.
    """
    said = words(log)
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if tracebacks := [number for number, line in enumerate(said) if line.startswith("Traceback (most recent call")]:
        behind = [line for line in said[tracebacks[-1] + 1 :] if not line.startswith(" ")]
        said = behind[:1] or said
    return said[-1] if said else f"exit code {exit_code}"
