"""Measure preparation of data: TRL's, ours, and the bare tokenizers.

    python scripts/benchmark.py data --json data.json \\
        --tokenizer outputs/smollm2-135m-instruct --rows 2000

Contenders run in turns (A B C, A B C, ...) on the same rows, so that other work of the machine affects all alike; each
run is a fresh process with empty caches. Only the kernel's cache of the rows' file is warm for all.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

from benchmarks.data_contenders import CONTENDERS, Memory, read_memory
from benchmarks.data_table import BARE, build_record, format_size, format_table
from benchmarks.process import failure_reason, running, script_command
from benchmarks.record import check_json_file, count_cores, describe_environment, publish
from benchmarks.rows import generate
from train.cli import non_negative_int, positive_int
from train.errors import UserError
from train.progress import progress_bar
from train.recipe import ChatSection, ModelSection

_SETTINGS = ("tokenizer", "template", "repeat", "max_length", "processes", "seed")
_PACKAGES = ("janus-sft", "trl", "transformers", "tokenizers", "fastokens", "datasets", "pyarrow", "numpy", "torch")
SECONDS_BETWEEN_SAMPLES = 0.05
SAMPLING_SHARE = 0.1
"""Largest share of a core for sampling memory: the kernel needs about 20 ms per GB, and locks the contender's pages."""


def add_to(commands: Any) -> None:
    """Add the command to those of benchmark.py."""
    parser = commands.add_parser("data", help="preparation of data: TRL's, ours, and tokenizers", description=__doc__)
    add = parser.add_argument
    add("--tokenizer", required=True, metavar="FOLDER_OR_ID", help="a model folder, or an id on the Hugging Face hub")
    add("--template", default="chatml", help="chat template with generation marks, which TRL needs (default chatml)")
    add("--rows", type=positive_int, default=20_000, help="Janus-like rows to generate (default 20,000)")
    add("--repeat", type=positive_int, default=5, help="runs of each contender; the table has medians (default 5)")
    add("--max-length", type=positive_int, default=8_192, help="tokens of a packed sequence (default 8,192)")
    add("--json", type=Path, metavar="FILE", help="write every measurement to FILE")
    add("--only", metavar="NAME,...", help=f"some of {','.join(CONTENDERS)} (default all; with --memory ours)")
    add("--processes", type=positive_int, default=count_cores(), help="processes of trl-N (default: the cores)")
    add("--seed", type=non_negative_int, default=42, help="decides every character of the rows (default 42)")
    about_memory = "compare peak memory between these numbers of rows instead (default 10000 100000)"
    add("--memory", type=positive_int, nargs="*", metavar="ROWS", help=about_memory)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure the contenders, print the table and write the record. Raises UserError."""
    if not Path("/proc/self/smaps_rollup").is_file():
        raise UserError("memory is read from /proc/PID/smaps_rollup, which this system lacks: run it on Linux")
    check_json_file(options.json)
    environment = describe_environment(_PACKAGES)
    settings = {key: getattr(options, key) for key in _SETTINGS} | {
        "contenders": options.only.split(",") if options.only else None,
        "rows": [options.rows] if options.memory is None else options.memory or [10_000, 100_000],
        "only_memory": options.memory is not None,
    }
    record = compare_preparations(settings)
    publish(format_table(record), environment, {"command": "data", **record}, options.json)


@dataclass(frozen=True)
class RowFiles:
    """Generated rows: as JSON lines, and as the text that the template renders."""

    count: int
    file: Path
    texts_file: Path
    bytes: int
    characters: int
    sha256: str


def compare_preparations(settings: dict[str, Any]) -> dict[str, Any]:
    """Generate the rows, measure the contenders in turns, compare their tokens, and return the record.

    Raises UserError if an option is invalid or a contender fails.
    """
    contenders = settings["contenders"] or (("ours",) if settings["only_memory"] else tuple(CONTENDERS))
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise UserError(f"--only: there is no {', '.join(map(repr, unknown))}. Choose from {', '.join(CONTENDERS)}.")
    if "ours-again" in contenders and "ours" not in contenders:
        raise UserError("--only: ours-again reads the cache of ours. Write `ours,ours-again`.")
    contenders = tuple(name for name in CONTENDERS if name in contenders)
    with TemporaryDirectory(prefix="janus-benchmark-") as name:
        folder = Path(name)
        with_texts = bool(set(BARE) & set(contenders))
        files = [write_rows(folder, count, with_texts, settings) for count in sorted(set(settings["rows"]))]
        measurements: list[dict[str, Any]] = []
        tokens: dict[tuple[str, int], Path] = {}
        total = settings["repeat"] * len(files) * len(contenders)
        with progress_bar("measuring", total=total, unit="runs") as measuring:
            for repetition in range(settings["repeat"]):
                for rows in files:
                    run_folder = folder / f"{rows.count}-{repetition}"
                    for contender in contenders:
                        measurement = measure(contender, repetition, rows, run_folder, settings)
                        measurements.append(measurement)
                        token_file = folder / f"{contender}-{rows.count}.npz"
                        tokens[contender, rows.count] = (run_folder / "tokens.npz").rename(token_file)
                        measuring.advance()
                        seconds, peak = measurement["seconds"], format_size(measurement["peak_memory"])
                        measuring.show(
                            f"{measuring.done}/{total} {contender}, {rows.count:,} rows: {seconds:.2f} s, "
                            f"{measurement['tokens'] / seconds:,.0f} tokens/s, {peak}"
                        )
                        if contender != "ours" or "ours-again" not in contenders:
                            shutil.rmtree(run_folder)  # caches of gigabytes
        rows_record = [
            {"count": rows.count, "bytes": rows.bytes, "characters": rows.characters, "sha256": rows.sha256}
            for rows in files
        ]
        differences = find_differences(tokens, settings)
        return build_record(settings, rows_record, measurements, differences)


def write_rows(folder: Path, count: int, with_texts: bool, settings: dict[str, Any]) -> RowFiles:
    """Write the rows, and with `with_texts` their rendered texts for the bare tokenizers."""
    from train.model.tokenizer import load_chat_tokenizer

    model, chat = ModelSection(name_or_path=settings["tokenizer"]), ChatSection(template=settings["template"])
    tokenizer = load_chat_tokenizer(model, chat).tokenizer
    file, texts_file = folder / f"rows-{count}.jsonl", folder / f"texts-{count}.jsonl"
    digest, characters = hashlib.sha256(), 0
    with (
        progress_bar(f"writing {count:,} rows", total=count, unit="rows") as writing,
        file.open("wb") as lines,
        texts_file.open("w", encoding="utf-8") as texts,
    ):
        for messages in generate(count, settings["seed"]):
            line = json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
            lines.write(line)
            digest.update(line)
            characters += sum(len(message["content"]) for message in messages)
            if with_texts:
                texts.write(json.dumps(tokenizer.apply_chat_template(messages, tokenize=False)) + "\n")
            writing.advance()
    return RowFiles(count, file, texts_file, file.stat().st_size, characters, digest.hexdigest())


def measure(contender: str, repetition: int, rows: RowFiles, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run one contender in a process of its own and sample its memory; it leaves tokens.npz in `folder`.

    Returns seconds, tokens, bytes and counts; `*_before` is memory when the clock starts, imports included.
    """
    folder.mkdir(exist_ok=True)
    paths = {"rows_file": str(rows.file), "texts_file": str(rows.texts_file), "folder": str(folder)}
    task = json.dumps({**settings, **paths, "contender": contender})
    samples: list[tuple[float, Memory]] = []
    with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        with running(script_command("data_contenders", task), log) as child:
            process = psutil.Process(child.pid)
            while child.poll() is None:
                began = time.monotonic()
                samples.append((began, read_memory(process)))
                seconds = time.monotonic() - began
                time.sleep(max(SECONDS_BETWEEN_SAMPLES, seconds / SAMPLING_SHARE - seconds))
        if child.returncode:
            reason = failure_reason(log, child.returncode)
            raise UserError(f"{contender} could not be measured: {reason} (--only measures some of the contenders)")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    started, ended = result.pop("started"), result.pop("ended")
    before, after = Memory(*result.pop("memory_before")), Memory(*result.pop("memory_after"))
    timed = [before, after, *(sample for moment, sample in samples if started <= moment <= ended)]
    return {
        "contender": contender,
        "repetition": repetition,
        "rows_in": rows.count,
        **result,
        "peak_memory": max(sample.total for sample in timed),
        "peak_anonymous": max(sample.anonymous for sample in timed),
        "memory_before": before.total,
        "anonymous_before": before.anonymous,
        "memory_samples": len(timed),
        "disk": sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()),
    }


def find_differences(files: Mapping[tuple[str, int], Path], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the tokens of contenders that should agree; `files`: tokens.npz by contender and number of rows."""
    from train.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelSection(name_or_path=settings["tokenizer"]))
    differences = []
    for rows in sorted({rows for _, rows in files}):
        for first, second in (("trl", "ours"), ("trl", "trl-N"), ("ours", "ours-again"), BARE):
            if (first, rows) not in files or (second, rows) not in files:
                continue
            tokens = [np.load(files[name, rows]) for name in (first, second)]
            documents = [Counter(contents["documents"].tolist()) for contents in tokens]
            size = max(len(contents["occurrences"]) for contents in tokens)
            change = {}
            for key in ("occurrences", "trained"):
                before, after = (np.pad(contents[key], (0, size - len(contents[key]))) for contents in tokens)
                change[key] = after - before
            largest = np.argsort(-np.abs(change["occurrences"]) - np.abs(change["trained"]), kind="stable")[:5]
            differences.append(
                {
                    "first": first,
                    "second": second,
                    "rows": rows,
                    "same_rows": (documents[0] & documents[1]).total(),
                    "only_first": (documents[0] - documents[1]).total(),
                    "only_second": (documents[1] - documents[0]).total(),
                    "tokens": int(change["occurrences"].sum()),
                    "trained_tokens": int(change["trained"].sum()),
                    "by_token": [
                        {"token": tokenizer.decode([index]), **{key: int(change[key][index]) for key in change}}
                        for index in largest.tolist()
                        if change["occurrences"][index] or change["trained"][index]
                    ],
                }
            )
    return differences
