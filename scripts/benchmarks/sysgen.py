"""Measure SYSGEN's four calls per row at full speed: distilabel's and ours.

    python scripts/benchmark.py sysgen --only ours --json sysgen.json

A scripted server answers each request after the same time, a fixed number at once. The ideal is 4 x rows x latency /
concurrency seconds, with no slot ever empty. Times run from the first request to the last answer, as the server saw
them. Each run has a fresh server, a fresh folder and an empty journal.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.process import PROJECT, failure_reason, running, script_command
from benchmarks.record import check_json_file, describe_environment, publish
from benchmarks.rows import generate
from benchmarks.sysgen_server import ROW_MARK, STAGES
from benchmarks.sysgen_table import compute_medians, format_table
from train.cli import non_negative_float, non_negative_int, positive_float, positive_int
from train.errors import UserError
from train.progress import progress_bar

_SETTINGS = ("latency", "concurrency", "repeat", "distilabel", "input_batch_size", "limit", "seed")
_PACKAGES = ("janus-sft", "openai", "httpx2", "httpcore2", "h11", "anyio")
CONTENDERS = ("bare", "ours", "distilabel")
HOW_TO_INSTALL = "python -m venv distilabel && distilabel/bin/pip install 'distilabel[openai]==1.5.3' requests"
"""In an environment of its own, as it would change our packages; it can't be imported without `requests`."""
CONVERSATIONS = 2_000
"""Number of different conversations; more rows repeat them, each with its own row number."""
_QUESTION = "Question {row}: could you please explain to me what the following text says, and what follows from it?"


def add_to(commands: Any) -> None:
    """Add the command to those of benchmark.py."""
    parser = commands.add_parser(
        "sysgen", help="SYSGEN's calls at full speed: distilabel's and ours", description=__doc__
    )
    add = parser.add_argument
    add("--rows", type=positive_int, default=2_000, help="questions with answers to generate (default 2,000)")
    about_latency = "time until each answer (default %(default)s)"
    add("--latency", type=non_negative_float, default=0.2, metavar="SECONDS", help=about_latency)
    add("--concurrency", type=positive_int, default=64, help="requests at once; one more gets 429 (default 64)")
    add("--repeat", type=positive_int, default=1, help="runs of each contender; the table has medians (default 1)")
    add("--json", type=Path, metavar="FILE", help="write every measurement to FILE")
    add("--only", metavar="NAME,...", help=f"some of {','.join(CONTENDERS)} (default all; with --memory ours)")
    add("--distilabel", metavar="PYTHON", help=f"the Python that has distilabel: {HOW_TO_INSTALL}")
    about_batch = "requests that a task of distilabel sends at once (default 64)"
    add("--input-batch-size", type=positive_int, default=64, metavar="ROWS", help=about_batch)
    about_limit = "longest time of one run (default %(default)g)"
    add("--limit", type=positive_float, default=3_600.0, metavar="SECONDS", help=about_limit)
    add("--seed", type=non_negative_int, default=42, help="decides every character of the rows (default 42)")
    about_memory = "compare peak memory between these numbers of rows instead, without latency (default 1000 100000)"
    add("--memory", type=positive_int, nargs="*", metavar="ROWS", help=about_memory)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure the contenders, print the table and write the record. Raises UserError."""
    check_json_file(options.json)
    environment = describe_environment(_PACKAGES)
    settings = {key: getattr(options, key) for key in _SETTINGS} | {
        "rows": [options.rows],
        "only_memory": options.memory is not None,
        "contenders": options.only.split(",") if options.only else None,
    }
    if options.memory is not None:
        settings |= {"rows": sorted(set(options.memory or (1_000, 100_000))), "latency": 0.0}
    record = compare_sysgen(settings)
    publish(format_table(record), environment, {"command": "sysgen", **record}, options.json)


def compare_sysgen(settings: dict[str, Any]) -> dict[str, Any]:
    """Write the rows, measure the contenders in turns, and return the record.

    Raises UserError if an option is invalid, or the bare client or ours fails; distilabel's failure is recorded.
    """
    contenders, failures = select_contenders(settings)
    measurements: list[dict[str, Any]] = []
    total = settings["repeat"] * len(settings["rows"]) * len(contenders)
    ideal = {rows: len(STAGES) * rows * settings["latency"] / settings["concurrency"] for rows in settings["rows"]}
    with (
        TemporaryDirectory(prefix="janus-benchmark-") as name,
        progress_bar("measuring", total=total, unit="runs") as measuring,
    ):
        files = {
            rows: write_rows(Path(name) / f"rows-{rows}.jsonl", rows, settings["seed"]) for rows in settings["rows"]
        }
        for repetition in range(settings["repeat"]):
            for rows, contender in ((rows, contender) for rows in settings["rows"] for contender in contenders):
                folder = Path(name) / f"{contender}-{rows}-{repetition}"
                folder.mkdir()
                try:
                    figures = measure(contender, rows, files[rows], folder, settings)
                except UserError as error:
                    if contender != "distilabel":
                        raise
                    failures[contender] = str(error)
                    continue
                measurements.append({"contender": contender, "repetition": repetition, "rows_in": rows, **figures})
                measuring.advance()
                ratio = f", {figures['seconds'] / ideal[rows]:.3f} times the ideal" if ideal[rows] else ""
                measuring.show(
                    f"{measuring.done}/{total} {contender}, {rows:,} rows: {figures['seconds']:.2f} s{ratio}, "
                    f"{figures['peak_memory'] / 1e6:.0f} MB (load before: {figures['load_before']:.2f})"
                )
    return {
        "settings": settings,
        "ideal_seconds": {str(rows): seconds for rows, seconds in ideal.items()},
        "medians": compute_medians(measurements, ideal),
        "failures": failures,
        "measurements": measurements,
    }


def select_contenders(settings: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the contenders to measure, and why others are not. Raises UserError."""
    if settings["only_memory"]:
        return ("ours",), {}
    names = settings["contenders"] or CONTENDERS
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise UserError(f"--only: there is no {', '.join(map(repr, unknown))}. Choose from {', '.join(CONTENDERS)}.")
    selected = tuple(name for name in CONTENDERS if name in names)
    if "distilabel" not in selected:
        return selected, {}
    if settings["distilabel"]:
        check_distilabel(settings["distilabel"])
        return selected, {}
    if settings["contenders"]:
        raise UserError(f"--distilabel: name the Python that has it. {HOW_TO_INSTALL} makes one.")
    reason = f"skipped: name the Python that has it with --distilabel ({HOW_TO_INSTALL})"
    return tuple(name for name in selected if name != "distilabel"), {"distilabel": reason}


def check_distilabel(python: str) -> None:
    """Raise UserError if `python` can't import distilabel."""
    script = "import distilabel.models, openai"
    try:
        result = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
        reason = result.stderr.strip().splitlines()[-1:] if result.returncode else []
    except OSError as error:
        reason = [str(error.strerror)]
    if reason:
        raise UserError(f"--distilabel {python}: no Python with distilabel ({reason[0]}). {HOW_TO_INSTALL} makes one.")


def write_rows(file: Path, rows: int, seed: int) -> Path:
    """Write questions and answers as long as those of Multifaceted Collection, each with its row number."""
    pairs = [tuple(turn["content"] for turn in turns[1:]) for turns in generate(min(rows, CONVERSATIONS), seed)]
    with file.open("w", encoding="utf-8") as lines:
        for index in range(rows):
            question, answer = pairs[index % len(pairs)]
            question = f"{_QUESTION.format(row=f'{ROW_MARK}{index}')}\n\n{question}"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return file


@contextmanager
def serving(latency: float, at_once: int) -> Iterator[subprocess.Popen[str]]:
    """Run the scripted server in a process of its own. It prints its port, and its figures at the end."""
    script = Path(__file__).with_name("sysgen_server.py")
    command = [sys.executable, str(script), "--latency", str(latency), "--at-once", str(at_once)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


def measure(contender: str, rows: int, rows_file: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run one contender and return its figures: seconds, bytes, answered requests and complete rows.

    - `seconds`: from the first request to the last answer; `process_seconds`: of the complete process;
    - `rows`: complete rows by the contender's own count; `peak_memory`: of its largest process.

    Raises UserError if it fails, exceeds the limit, or skips a call.
    """
    load_before = round(os.getloadavg()[0], 2)
    with (
        serving(settings["latency"], settings["concurrency"]) as server,
        (folder / "log.txt").open("w+", errors="replace") as log,
    ):
        assert server.stdout is not None
        base_url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        command = build_command(contender, base_url, rows_file, folder, settings)
        task = json.dumps({"usage_file": str(folder / "usage.json"), "command": command})
        quiet = {"DISTILABEL_LOG_LEVEL": "WARNING", "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            with running(script_command("usage", task), log, quiet) as child:
                child.wait(settings["limit"])
        except subprocess.TimeoutExpired:
            raise UserError(f"{contender} was ended after {settings['limit']:g} s (--limit)") from None
        if child.returncode:
            raise UserError(f"{contender} could not be measured: {failure_reason(log, child.returncode)}")
        seen = json.loads(server.communicate()[0])
    complete = count_complete_rows(contender, folder)
    if contender != "distilabel" and (complete, set(seen["answered"].values())) != (rows, {rows}):
        raise UserError(f"{contender}: {complete:,} of {rows:,} rows are complete, with {seen['answered']} answers")
    usage = json.loads((folder / "usage.json").read_text(encoding="utf-8"))
    return {"rows": complete, "load_before": load_before, **seen, **usage}


def build_command(contender: str, base_url: str, rows_file: Path, folder: Path, settings: dict[str, Any]) -> list[str]:
    """Return the contender's command. Its configuration is JSON, which is YAML as well."""
    scripts = PROJECT / "scripts"
    if contender == "ours":
        config = {
            "model": "scripted",
            "servers": [{"base_url": base_url, "concurrency": settings["concurrency"]}],
            "data": {"sources": [{"path": str(rows_file)}]},
            "gates": {"judge": True},
            "output_dir": str(folder / "output"),
        }
        (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        return [sys.executable, str(scripts / "sysgen.py"), "--config", str(folder / "config.yaml")]
    task = {"base_url": base_url, "rows_file": str(rows_file), "folder": str(folder)}
    if contender == "bare":
        return script_command("sysgen_bare", json.dumps({**task, "concurrency": settings["concurrency"]}))
    task_of_distilabel = json.dumps({**task, "input_batch_size": settings["input_batch_size"]})
    return [settings["distilabel"], str(scripts / "benchmarks" / "sysgen_distilabel.py"), task_of_distilabel]


def count_complete_rows(contender: str, folder: Path) -> int:
    """Return the number of complete rows in the contender's output."""
    if contender != "ours":
        return int(json.loads((folder / "result.json").read_text(encoding="utf-8"))["rows"])
    with (folder / "output" / "data" / "rows.jsonl").open(encoding="utf-8") as lines:
        return sum(json.loads(line)["messages"][0]["role"] == "system" for line in lines)
