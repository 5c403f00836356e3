"""`benchmark.py data`: every contender in a process of its own, in turns on the same rows, and the table of medians.

In turns (A B C, A B C, ...), so that whatever else the machine does hits all alike; a fresh process and fresh caches
each time, so that none gains from the one before. Only the kernel's cache of the rows' file is warm for all.
"""

import hashlib
import json
import shutil
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

from benchmarks.data_contenders import CONTENDERS, Memory, Task, memory
from benchmarks.process import last_words, running
from benchmarks.rows import generate
from train.errors import UserError
from train.model.tokenizer import load_chat_tokenizer, load_tokenizer
from train.progress import ProgressBar, progress_bar
from train.recipe import ChatSection, ModelSection

SECONDS_BETWEEN_SAMPLES = 0.05
SHARE_OF_A_CORE = 0.1
"""Most that sampling the memory may take: the kernel needs some 20 ms a GB, and the contender waits for its pages."""
BARE = ("tokenizer", "fastokens")
"""They turn texts into ids and no more: nothing is labelled, packed or left on the disk."""
RATIOS = (("ours", "trl"), ("ours", "trl-N"), ("ours-again", "trl-N"), ("ours", "tokenizer"), ("ours", "fastokens"))


@dataclass(frozen=True)
class Options:
    """What to compare. `rows`: one number, or several to compare the memory of. `contenders`: None = all of them."""

    tokenizer: str
    template: str
    contenders: tuple[str, ...] | None
    rows: tuple[int, ...]
    only_memory: bool
    repeat: int
    max_length: int
    processes: int
    seed: int

    def called(self, contender: str) -> str:
        """The contender's name for people."""
        return CONTENDERS[contender].format(processes=self.processes)


@dataclass(frozen=True)
class Rows:
    """Rows on disk: as jsonl, and as their template writes them."""

    count: int
    file: Path
    texts_file: Path
    file_bytes: int
    characters: int
    sha256: str


@dataclass(frozen=True)
class Measurement:
    """One run of one contender; bytes, tokens and seconds. `*_before`: memory as the clock started, imports and all."""

    contender: str
    repetition: int
    rows_in: int
    rows: int
    tokens: int
    trained_tokens: int
    untrained_rows: int
    sequences: int
    seconds: float
    cpu_seconds: float
    peak_memory: int
    peak_anonymous: int
    memory_before: int
    anonymous_before: int
    memory_samples: int
    disk: int


@dataclass(frozen=True)
class Result:
    """All measurements, and where contenders that should agree don't."""

    options: Options
    rows: list[Rows]
    measurements: list[Measurement]
    differences: list[dict[str, Any]]

    def of(self, contender: str, rows_in: int) -> list[Measurement]:
        """The repetitions of one contender."""
        return [one for one in self.measurements if (one.contender, one.rows_in) == (contender, rows_in)]

    def medians(self) -> list[dict[str, Any]]:
        """For each contender and number of rows the medians, with what follows from them.

        `tokens_lost` is None where no bare tokenizer ran that tells how many there were.
        """
        lines = []
        for rows in self.rows:
            whole = next((m.tokens for name in BARE for m in self.of(name, rows.count)), None)
            for name in CONTENDERS:
                if not (runs := self.of(name, rows.count)):
                    continue
                median: dict[str, Any] = {"contender": name}
                for key in asdict(runs[0]).keys() - {"contender", "repetition"}:
                    median[key] = statistics.median(getattr(run, key) for run in runs)
                median["fastest"], median["slowest"] = min(r.seconds for r in runs), max(r.seconds for r in runs)
                median["rows_per_second"] = rows.count / median["seconds"]
                median["tokens_per_second"] = median["tokens"] / median["seconds"]
                median["filling"] = median["tokens"] / (median["sequences"] * self.options.max_length)
                median["rows_lost"] = rows.count - median["rows"]
                median["tokens_lost"] = None if whole is None else whole - median["tokens"]
                lines.append(median)
        return lines

    def ratios(self) -> dict[str, float]:
        """How many times as fast the first is as the second, by the medians; of a run with one number of rows."""
        seconds = {line["contender"]: line["seconds"] for line in self.medians()}
        known = [pair for pair in RATIOS if seconds.keys() >= set(pair)] if len(self.rows) == 1 else []
        return {f"{first} / {second}": seconds[second] / seconds[first] for first, second in known}

    def growth(self) -> dict[str, dict[str, float]]:
        """Contender -> by how much peak memory changes from the fewest rows to the most, as a share."""
        if len(self.rows) == 1:
            return {}
        fewest, most = (edge(rows.count for rows in self.rows) for edge in (min, max))
        lines = {(line["contender"], line["rows_in"]): line for line in self.medians()}
        return {
            name: {
                key: lines[name, most][key] / lines[name, fewest][key] - 1 for key in ("peak_memory", "peak_anonymous")
            }
            for name in dict.fromkeys(name for name, _ in lines)
        }

    def markdown(self) -> str:
        """The table, the ratios, and what differs between those that should agree."""
        lines = [
            "| | rows | seconds (range) | rows/s | tokens/s | peak memory | without file pages | on disk | filling "
            "| rows lost | tokens lost |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for line in self.medians():
            bare = line["contender"] in BARE
            lost = "–" if line["tokens_lost"] is None else f"{line['tokens_lost']:,.0f}"
            left = (
                ["–"] * 4
                if bare
                else [_size(line["disk"]), f"{line['filling']:.2%}", f"{line['rows_lost']:,.0f}", lost]
            )
            cells = [
                self.options.called(line["contender"]),
                f"{line['rows_in']:,}",
                f"{line['seconds']:.2f} ({line['fastest']:.2f}-{line['slowest']:.2f})",
                f"{line['rows_per_second']:,.0f}",
                f"{line['tokens_per_second']:,.0f}",
                _size(line["peak_memory"]),
                _size(line["peak_anonymous"]),
                *left,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        called = self.options.called
        for pair, ratio in self.ratios().items():
            first, second = pair.split(" / ")
            lines.append(f"- {called(first)}: {ratio:.2f} times as fast as {called(second)}")
        lines += [
            f"- {called(name)}, peak memory from {min(rows.count for rows in self.rows):,} to "
            f"{max(rows.count for rows in self.rows):,} rows: {grown['peak_memory']:+.0%}, without file pages "
            f"{grown['peak_anonymous']:+.0%}"
            for name, grown in self.growth().items()
        ]
        lines += [f"- {_told(difference, self.options)}" for difference in self.differences]
        lines += [
            f"- {called(line['contender'])}: {line['untrained_rows']:,.0f} rows have no trained token left, as their "
            "answer was cut off"
            for line in self.medians()
            if line["untrained_rows"] and line["contender"] not in BARE
        ]
        options = self.options
        settings = (
            f"Medians of {options.repeat}, contenders in turns, each in a fresh process with empty caches; imports "
            f"and loading the tokenizer not counted. Tokenizer {Path(options.tokenizer).name}, "
            f"template {options.template}, max_length {options.max_length:,}, seed {options.seed}."
        )
        return "\n".join([*lines, "", settings])

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "settings": asdict(self.options),
            "rows": [
                {"count": r.count, "bytes": r.file_bytes, "characters": r.characters, "sha256": r.sha256}
                for r in self.rows
            ],
            "medians": self.medians(),
            "ratios": self.ratios(),
            "growth": self.growth(),
            "differences": self.differences,
            "measurements": [asdict(one) for one in self.measurements],
        }


def compare_preparations(options: Options) -> Result:
    """Write the rows, measure every contender in turn, and compare what came out. Shows how far it is.

    Raises UserError where an option can't be met or a contender can't run.
    """
    contenders = options.contenders or (("ours",) if options.only_memory else tuple(CONTENDERS))
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise UserError(f"--only: there is no {', '.join(map(repr, unknown))}. Choose from {', '.join(CONTENDERS)}.")
    if "ours-again" in contenders and "ours" not in contenders:
        raise UserError("--only: ours-again finds what ours left before it. Write `ours,ours-again`.")
    contenders = tuple(name for name in CONTENDERS if name in contenders)
    with TemporaryDirectory(prefix="janus-benchmark-") as name:
        folder = Path(name)
        several = [_write_rows(folder, count, contenders, options) for count in sorted(set(options.rows))]
        measurements: list[Measurement] = []
        tokens: dict[tuple[str, int], Path] = {}
        total = options.repeat * len(several) * len(contenders)
        with progress_bar("measuring", total=total, unit="runs") as measuring:
            for repetition in range(options.repeat):
                for rows in several:
                    runs = folder / f"{rows.count}-{repetition}"
                    for contender in contenders:
                        measured, counts = _measure(contender, repetition, rows, runs, options)
                        measurements.append(measured)
                        tokens[contender, rows.count] = counts.rename(folder / f"{contender}-{rows.count}.npz")
                        measuring.advance()
                        measuring.show(_line(measured, measuring, total))
                        if contender != "ours" or "ours-again" not in contenders:
                            shutil.rmtree(runs)  # caches of gigabytes
        return Result(options, several, measurements, _differences(tokens, several, options))


def _line(measured: Measurement, measuring: ProgressBar, total: int) -> str:
    return (
        f"{measuring.done}/{total} {measured.contender}, {measured.rows_in:,} rows: {measured.seconds:.2f} s, "
        f"{measured.tokens / measured.seconds:,.0f} tokens/s, {_size(measured.peak_memory)}"
    )


def _write_rows(folder: Path, count: int, contenders: tuple[str, ...], options: Options) -> Rows:
    """The rows as jsonl, and as text where a bare tokenizer needs that."""
    model, chat = ModelSection(name_or_path=options.tokenizer), ChatSection(template=options.template)
    tokenizer = load_chat_tokenizer(model, chat).tokenizer
    file, texts_file = folder / f"rows-{count}.jsonl", folder / f"texts-{count}.jsonl"
    digest, characters = hashlib.sha256(), 0
    with (
        progress_bar(f"writing {count:,} rows", total=count, unit="rows") as writing,
        file.open("wb") as lines,
        texts_file.open("w", encoding="utf-8") as texts,
    ):
        for messages in generate(count, options.seed):
            line = json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
            lines.write(line)
            digest.update(line)
            characters += sum(len(message["content"]) for message in messages)
            if set(BARE) & set(contenders):
                texts.write(json.dumps(tokenizer.apply_chat_template(messages, tokenize=False)) + "\n")
            writing.advance()
    return Rows(count, file, texts_file, file.stat().st_size, characters, digest.hexdigest())


def _measure(contender: str, repetition: int, rows: Rows, folder: Path, options: Options) -> tuple[Measurement, Path]:
    """Run one contender in a process of its own, and watch its memory; what it measured, and the file of its tokens."""
    folder.mkdir(exist_ok=True)
    task = Task(
        contender=contender,
        tokenizer=options.tokenizer,
        template=options.template,
        rows_file=rows.file,
        texts_file=rows.texts_file,
        folder=folder,
        max_length=options.max_length,
        processes=options.processes,
    )
    samples: list[tuple[float, Memory]] = []
    with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        with running("data_contenders", task.to_json(), log) as child:
            watched = psutil.Process(child.pid)
            while child.poll() is None:
                asked = time.monotonic()
                samples.append((asked, memory(watched)))
                took = time.monotonic() - asked
                time.sleep(max(SECONDS_BETWEEN_SAMPLES, took / SHARE_OF_A_CORE - took))
        if child.returncode:
            last = last_words(log, child.returncode)
            raise UserError(f"{contender} could not be measured: {last} (--only measures some of the contenders)")
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    started, ended = found.pop("started"), found.pop("ended")
    before, after = Memory(*found.pop("memory_before")), Memory(*found.pop("memory_after"))
    seen = [before, after, *(sample for moment, sample in samples if started <= moment <= ended)]
    measured = Measurement(
        contender=contender,
        repetition=repetition,
        rows_in=rows.count,
        peak_memory=max(sample.total for sample in seen),
        peak_anonymous=max(sample.anonymous for sample in seen),
        memory_before=before.total,
        anonymous_before=before.anonymous,
        memory_samples=len(seen),
        disk=sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()),
        **found,
    )
    return measured, folder / "tokens.npz"


def _differences(files: dict[tuple[str, int], Path], several: list[Rows], options: Options) -> list[dict[str, Any]]:
    """What `first` and `second` did differently with the same rows, down to the tokens that differ most."""
    tokenizer = load_tokenizer(ModelSection(name_or_path=options.tokenizer))
    found = []
    for rows in several:
        for first, second in (("trl", "ours"), ("trl", "trl-N"), ("ours", "ours-again"), BARE):
            if (first, rows.count) not in files or (second, rows.count) not in files:
                continue
            one, other = (np.load(files[name, rows.count]) for name in (first, second))
            documents = [Counter(each["documents"].tolist()) for each in (one, other)]
            size = max(len(one["occurrences"]), len(other["occurrences"]))
            change = {
                key: np.pad(other[key], (0, size - len(other[key]))) - np.pad(one[key], (0, size - len(one[key])))
                for key in ("occurrences", "trained")
            }
            most = np.argsort(-np.abs(change["occurrences"]) - np.abs(change["trained"]), kind="stable")[:5]
            found.append(
                {
                    "first": first,
                    "second": second,
                    "rows": rows.count,
                    "same_rows": (documents[0] & documents[1]).total(),
                    "only_first": (documents[0] - documents[1]).total(),
                    "only_second": (documents[1] - documents[0]).total(),
                    "tokens": int(change["occurrences"].sum()),
                    "trained_tokens": int(change["trained"].sum()),
                    "by_token": [
                        {"token": tokenizer.decode([index]), **{key: int(change[key][index]) for key in change}}
                        for index in most.tolist()
                        if change["occurrences"][index] or change["trained"][index]
                    ],
                }
            )
    return found


def _told(difference: dict[str, Any], options: Options) -> str:
    """A difference in words."""
    first, second = options.called(difference["first"]), options.called(difference["second"])
    what = "ids" if difference["first"] in BARE else "ids and labels"
    if not difference["only_first"] and not difference["only_second"]:
        return f"{first} and {second}: the same {what} in all {difference['same_rows']:,} rows"
    tokens = "; ".join(
        f"{each['token']!r} {each['occurrences']:+,}, trained {each['trained']:+,}" for each in difference["by_token"]
    )
    return (
        f"{first} and {second}: the same {what} in {difference['same_rows']:,} rows, {difference['only_first']:,} only "
        f"in the first, {difference['only_second']:,} only in the second, which has {difference['tokens']:+,} tokens "
        f"and {difference['trained_tokens']:+,} trained ones; the tokens that differ most: {tokens or 'none'}"
    )


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
