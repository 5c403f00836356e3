"""`benchmark.py sysgen`: SYSGEN's four calls for each row, asked of a server that always takes the same time.

A server that answers after `latency` seconds, so many requests at once, needs 4 x rows x latency / at_once: that is the
ideal, in which no place is ever empty. What each contender takes is what the server saw, from its first request to its
last answer, and beside it the whole process, with its imports and its report. Each in turn, with a fresh server, a
fresh folder and an empty journal.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.process import last_words, running
from benchmarks.rows import generate
from benchmarks.sysgen_server import ROW_MARK, STAGES
from benchmarks.sysgen_table import markdown, medians
from train.errors import UserError
from train.progress import progress_bar

CONTENDERS = ("bare", "ours", "distilabel")
HOW_TO_INSTALL = "python -m venv distilabel && distilabel/bin/pip install 'distilabel[openai]==1.5.3' requests"
"""In an environment of its own, as it would change our packages; it does not import without `requests`."""
CONVERSATIONS = 2_000
"""So many differ; beyond them they come again, each time as a row with a number of its own."""
_QUESTION = "Question {row}: could you please explain to me what the following text says, and what follows from it?"


@dataclass(frozen=True)
class Options:
    """What to measure. `rows`: several to compare the memory of. `distilabel`: its Python, None = it is left out."""

    rows: tuple[int, ...]
    only_memory: bool
    latency: float
    concurrency: int
    repeat: int
    contenders: tuple[str, ...] | None
    distilabel: str | None
    input_batch_size: int
    limit: float
    seed: int

    def ideal(self, rows: int) -> float:
        """Seconds."""
        return len(STAGES) * rows * self.latency / self.concurrency


@dataclass(frozen=True)
class Measurement:
    """One run of one contender; seconds and bytes. `rows`: those that came through all four calls, by its own count.

    `seconds`: from the first request to the last answer; `peak_memory`: of its largest process.
    """

    contender: str
    repetition: int
    rows_in: int
    rows: int
    answered: dict[str, int]
    seconds: float
    process_seconds: float
    cpu_seconds: float
    server_cpu_seconds: float
    peak_memory: int
    most_at_once: int
    too_many: int
    load_before: float


@dataclass(frozen=True)
class Result:
    """All measurements, and who could not be measured."""

    options: Options
    measurements: list[Measurement]
    failures: dict[str, str]

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        options = self.options
        return {
            "settings": asdict(options),
            "ideal_seconds": {str(rows): options.ideal(rows) for rows in options.rows},
            "medians": medians(self.record_of_runs(), {rows: options.ideal(rows) for rows in options.rows}),
            "failures": self.failures,
            "measurements": self.record_of_runs(),
        }

    def record_of_runs(self) -> list[dict[str, Any]]:
        """The measurements as plain values."""
        return [asdict(one) for one in self.measurements]

    def markdown(self) -> str:
        """The table, and what else there is to say."""
        return markdown(self.record())


def compare_sysgen(options: Options) -> Result:
    """Write the rows, and let every contender ask in turn. Shows how far it is.

    Raises UserError where an option can't be met, and where the bare client or ours can't be measured.
    """
    contenders, failures = _contenders(options)
    measurements: list[Measurement] = []
    total = options.repeat * len(options.rows) * len(contenders)
    with (
        TemporaryDirectory(prefix="janus-benchmark-") as name,
        progress_bar("measuring", total=total, unit="runs") as measuring,
    ):
        files = {rows: _write_rows(Path(name) / f"rows-{rows}.jsonl", rows, options.seed) for rows in options.rows}
        for repetition in range(options.repeat):
            for rows, contender in ((rows, contender) for rows in options.rows for contender in contenders):
                folder = Path(name) / f"{contender}-{rows}-{repetition}"
                folder.mkdir()
                try:
                    measured = _measure(contender, repetition, rows, files[rows], folder, options)
                except UserError as failure:
                    if contender != "distilabel":
                        raise
                    failures[contender] = str(failure)
                    continue
                measurements.append(measured)
                measuring.advance()
                measuring.show(_line(measured, measuring.done, total, options))
    return Result(options, measurements, failures)


def _contenders(options: Options) -> tuple[tuple[str, ...], dict[str, str]]:
    """Who is measured, and why others are not. Raises UserError."""
    if options.only_memory:
        return ("ours",), {}
    asked = options.contenders or CONTENDERS
    if unknown := [name for name in asked if name not in CONTENDERS]:
        raise UserError(f"--only: there is no {', '.join(map(repr, unknown))}. Choose from {', '.join(CONTENDERS)}.")
    if "distilabel" not in asked:
        return tuple(name for name in CONTENDERS if name in asked), {}
    if options.distilabel is None:
        if options.contenders:
            raise UserError(f"--distilabel: name the Python that has it. {HOW_TO_INSTALL} makes one.")
        why = f"left out: name the Python that has it with --distilabel ({HOW_TO_INSTALL})"
        return tuple(name for name in CONTENDERS if name in asked and name != "distilabel"), {"distilabel": why}
    _refuse_without_distilabel(options.distilabel)
    return tuple(name for name in CONTENDERS if name in asked), {}


def _refuse_without_distilabel(python: str) -> None:
    script = "import distilabel.models, openai"
    try:
        found = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
        why = found.stderr.strip().splitlines()[-1:] if found.returncode else []
    except OSError as error:
        why = [str(error.strerror)]
    if why:
        raise UserError(f"--distilabel {python}: no Python with distilabel ({why[0]}). {HOW_TO_INSTALL} makes one.")


def _line(measured: Measurement, done: int, total: int, options: Options) -> str:
    ideal = options.ideal(measured.rows_in)
    ratio = f", {measured.seconds / ideal:.3f} times the ideal" if ideal else ""
    return (
        f"{done}/{total} {measured.contender}, {measured.rows_in:,} rows: {measured.seconds:.2f} s{ratio}, "
        f"{measured.peak_memory / 1e6:.0f} MB (load before: {measured.load_before:.2f})"
    )


def _write_rows(file: Path, rows: int, seed: int) -> Path:
    """Questions and answers as long as those of Multifaceted Collection, each row with its number."""
    pairs = [
        tuple(turn["content"] for turn in turns[1:]) for turns in generate(min(rows, CONVERSATIONS), seed)
    ]  # their system messages aren't wanted here
    with file.open("w", encoding="utf-8") as lines:
        for index in range(rows):
            question, answer = pairs[index % len(pairs)]
            question = f"{_QUESTION.format(row=f'{ROW_MARK}{index}')}\n\n{question}"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return file


@contextmanager
def serving(latency: float, at_once: int) -> Iterator[subprocess.Popen[str]]:
    """The scripted server in a process of its own. It writes its port, and in the end what it saw."""
    script = Path(__file__).with_name("sysgen_server.py")
    command = [sys.executable, str(script), "--latency", str(latency), "--at-once", str(at_once)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


def _measure(
    contender: str, repetition: int, rows: int, rows_file: Path, folder: Path, options: Options
) -> Measurement:
    """One run. Raises UserError where it fails, takes too long, or leaves a call out."""
    load_before = round(os.getloadavg()[0], 2)
    with (
        serving(options.latency, options.concurrency) as server,
        (folder / "log.txt").open("w+", errors="replace") as log,
    ):
        assert server.stdout is not None
        base_url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        task = {
            "usage_file": str(folder / "usage.json"),
            "command": _command(contender, base_url, rows_file, folder, options),
        }
        quiet = {**os.environ, "DISTILABEL_LOG_LEVEL": "WARNING", "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            with running("usage", json.dumps(task), log, quiet) as child:
                child.wait(options.limit)
        except subprocess.TimeoutExpired:
            raise UserError(f"{contender} was ended after {options.limit:g} s (--limit)") from None
        if child.returncode:
            raise UserError(f"{contender} could not be measured: {last_words(log, child.returncode)}")
        seen = json.loads(server.communicate()[0])
    complete = _rows_complete(contender, folder)
    if contender != "distilabel" and (complete, set(seen["answered"].values())) != (rows, {rows}):
        raise UserError(f"{contender}: {complete:,} of {rows:,} rows came through, with {seen['answered']} answers")
    used = json.loads((folder / "usage.json").read_text(encoding="utf-8"))
    return Measurement(
        contender=contender, repetition=repetition, rows_in=rows, rows=complete, load_before=load_before, **seen, **used
    )


def _command(contender: str, base_url: str, rows_file: Path, folder: Path, options: Options) -> list[str]:
    """What is run. Configurations are JSON, which is YAML as well."""
    scripts = Path(__file__).parents[1]
    if contender == "ours":
        settings = {
            "model": "scripted",
            "servers": [{"base_url": base_url, "concurrency": options.concurrency}],
            "data": {"sources": [{"path": str(rows_file)}]},
            "gates": {"judge": True},
            "output_dir": str(folder / "output"),
        }
        (folder / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
        return [sys.executable, str(scripts / "sysgen.py"), "--config", str(folder / "config.yaml")]
    task = {"base_url": base_url, "rows_file": str(rows_file), "folder": str(folder)}
    if contender == "bare":
        task_of_bare = {**task, "concurrency": options.concurrency}
        return [sys.executable, str(scripts / "benchmarks" / "sysgen_bare.py"), json.dumps(task_of_bare)]
    task_of_distilabel = {**task, "input_batch_size": options.input_batch_size}
    assert options.distilabel is not None
    return [options.distilabel, str(scripts / "benchmarks" / "sysgen_distilabel.py"), json.dumps(task_of_distilabel)]


def _rows_complete(contender: str, folder: Path) -> int:
    """By what it wrote."""
    if contender != "ours":
        return int(json.loads((folder / "result.json").read_text(encoding="utf-8"))["rows"])
    with (folder / "output" / "data" / "rows.jsonl").open(encoding="utf-8") as lines:
        return sum(json.loads(line)["messages"][0]["role"] == "system" for line in lines)
