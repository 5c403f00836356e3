"""`benchmark.py train`: training steps of plain TRL and of ours under several settings, each in a process of its own.

Nothing that was measured is lost: the JSON file is written anew, whole, after each contender, one that fails is a line
with its reason, and the same command goes on with those that are missing.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks.process import end, last_words, running, words
from benchmarks.training_settings import Contender, Lengths, Task, chosen, every, usual
from benchmarks.training_table import line_of, markdown, ratios, shown
from train.errors import UserError
from train.preflight.json_report import write_json
from train.progress import ProgressBar, progress_bar

_LINES_OF_A_FAILURE = 60
_KEPT = ("command", "settings", "calls", "measurements")  # the table follows from them


@dataclass(frozen=True)
class Options:
    """What to measure. `patterns`: None = the usual contenders. `seconds`: of the call, None = until all are done.

    `limit`: seconds that one contender may take. `again`: also what the file has already.
    """

    file: Path
    lengths: Lengths
    patterns: tuple[str, ...] | None
    all: bool
    again: bool
    seconds: float | None
    limit: float

    def contenders(self, automatic: str | None) -> list[Contender]:
        """Those asked for; `automatic` as `usual` has it."""
        return chosen(self.patterns, every() if self.all else usual(automatic))


class Record:
    """The JSON file: what was measured, by this call and those before it."""

    def __init__(self, file: Path, lengths: Lengths, call: dict[str, Any]) -> None:
        """`call`: machine, versions and device. Raises UserError for a file that this call can't add to."""
        self._file = file
        self._content: dict[str, Any] = {
            "command": "train",
            "settings": asdict(lengths),
            "calls": [],
            "measurements": [],
        }
        if file.exists():
            self._content = _read(file)
            self._refuse_others(lengths, call)
        self._content["calls"].append(call)
        self._save()  # now, and not after minutes, is when to learn that it can't be written

    @property
    def device(self) -> dict[str, Any]:
        """The device of this call."""
        device: dict[str, Any] = self._content["calls"][-1]["device"]
        return device

    @property
    def measurements(self) -> list[dict[str, Any]]:
        """One for each contender."""
        found: list[dict[str, Any]] = self._content["measurements"]
        return found

    def has(self, contender: Contender) -> bool:
        """Whether it was measured, or failed, with the settings that it has now; a kernel may come to be installed."""
        return any(
            one["name"] == contender.name and one["settings"] == contender.settings() and not one.get("refused")
            for one in self.measurements
        )

    def add(self, measurement: dict[str, Any]) -> None:
        """Take it in, in the place of an earlier one of its name, and write the file."""
        kept = [one for one in self.measurements if one["name"] != measurement["name"]]
        self._content["measurements"] = [*kept, {**measurement, "call": len(self._content["calls"]) - 1}]
        self._save()

    def table(self) -> list[dict[str, Any]]:
        """What the table shows, in the order of the usual contenders, others behind them."""
        names = dict.fromkeys(one.name for one in [*usual(None), *every()])
        order = {name: place for place, name in enumerate(names)}
        known = sorted(self.measurements, key=lambda one: order.get(one["name"], len(order)))
        return [line_of(one, self._content["calls"][one["call"]]["device"]["peak_flops"]) for one in known]

    def markdown(self) -> str:
        """The table and what follows from it."""
        return markdown(self.table(), self._content["settings"])

    def _save(self) -> None:
        table = self.table()
        write_json({**self._content, "table": table, "ratios": ratios(table)}, self._file)

    def _refuse_others(self, lengths: Lengths, call: dict[str, Any]) -> None:
        name, before = self._file, self._content
        remedy = "Measurements of both can't stand in one table: name another file."
        if different := [key for key, value in asdict(lengths).items() if before["settings"].get(key) != value]:
            raise UserError(f"--json {name}: it was measured with other settings ({', '.join(different)}). {remedy}")
        for earlier in before["calls"]:
            if earlier["device"]["device"] != call["device"]["device"]:
                raise UserError(
                    f"--json {name}: it was measured on {earlier['device']['device']}, this is "
                    f"{call['device']['device']}. {remedy}"
                )
            for package, version in call["versions"].items():
                other = earlier["versions"].get(package)
                if version and other and version != other:
                    raise UserError(
                        f"--json {name}: it was measured with {package} {other}, here is {version}. {remedy}"
                    )


def _read(file: Path) -> dict[str, Any]:
    """An earlier record. Raises UserError for any other file."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as fault:
        raise UserError(f"--json {file}: it can't be read: {fault}. Name another file.") from fault
    if not isinstance(found, dict) or found.get("command") != "train" or not found.keys() >= set(_KEPT):
        raise UserError(
            f"--json {file}: that holds no measurements of `train`, so nothing is added. Name another file."
        )
    return {key: found[key] for key in _KEPT}


def compare_trainers(options: Options, where: dict[str, Any], versions: dict[str, str | None]) -> Record:
    """Measure what is asked for and missing in the file, as long as there is time. Shows how far it is.

    Raises UserError where an option can't be met.
    """
    deadline = None if options.seconds is None else time.monotonic() + options.seconds
    options.contenders(None)  # a misspelt name is said at once
    if not options.file.parent.is_dir():
        raise UserError(f"--json {options.file}: there is no folder {options.file.parent}")
    if options.file.exists():
        _read(options.file)  # so is a file that is something else
    with TemporaryDirectory(prefix="janus-benchmark-") as name:
        device = _probe(Path(name), options.lengths)
        record = Record(options.file, options.lengths, {"machine": where, "versions": versions, "device": device})
        print(
            f"attention: auto is {'; because '.join([device['automatic'], *device['automatic_reasons'][:1]])}",
            flush=True,
        )
        contenders = options.contenders(device["automatic"])
        missing = [one for one in contenders if options.again or not record.has(one)]
        left = measure_all(missing, record, options, Path(name), deadline)
    if left:
        print(f"not run for lack of time, the same command goes on with them: {', '.join(one.name for one in left)}")
    return record


def measure_all(
    contenders: Sequence[Contender], record: Record, options: Options, folder: Path, deadline: float | None
) -> list[Contender]:
    """Measure one after the other; those that are left when the deadline comes (time.monotonic).

    None is started in less time than the quickest took, and what runs at the deadline is stopped and counts as not run.
    """
    shortest = 0.0
    with progress_bar("measuring", total=len(contenders), unit="contenders") as measuring:
        for number, contender in enumerate(contenders):
            begun = time.monotonic()
            left = float("inf") if deadline is None else deadline - begun
            if left <= shortest:
                return list(contenders[number:])
            measured = _refused(contender, record.device) or _measure(contender, options, folder, left)
            if measured is None:
                return list(contenders[number:])
            record.add(measured)
            if "steps" in measured:
                took = time.monotonic() - begun
                shortest = min(shortest or took, took)
            measuring.advance()
            _show(measuring, line_of(measured, record.device["peak_flops"]))
    return []


def _show(measuring: ProgressBar, line: dict[str, Any]) -> None:
    measuring.show(f"{measuring.done}/{measuring.total} {shown(line)}")


def _refused(contender: Contender, device: dict[str, Any]) -> dict[str, Any] | None:
    """A kernel that can't be used here needs no process to find that out."""
    reason = device["kernels"].get(dict(contender.changes).get("attention"))
    return reason and {**_named(contender), "reason": reason, "refused": True}


def _named(contender: Contender) -> dict[str, Any]:
    return {"name": contender.name, "settings": contender.settings()}


def _measure(contender: Contender, options: Options, folder: Path, left: float) -> dict[str, Any] | None:
    """Run one contender in a process of its own; None if it was not done in the time left."""
    own, seconds = folder / contender.name, min(options.limit, left)
    ended = _run(Task(contender.name, options.lengths, own, time.monotonic()), seconds)
    shutil.rmtree(own)
    if ended.exit_code is None and left < options.limit:
        return None
    measured = {**_named(contender), **ended.result}
    if ended.exit_code == 0:
        return measured
    reason = ended.reason if ended.exit_code else f"not done after {options.limit:g} seconds (--limit)"
    return {**measured, "reason": reason, "log": ended.log[-_LINES_OF_A_FAILURE:]}


def _probe(folder: Path, lengths: Lengths) -> dict[str, Any]:
    """What a process on the device says of it. Raises UserError where it can't."""
    ended = _run(Task(None, lengths, folder / "probe"), None)
    if ended.exit_code:
        raise UserError(f"the device can't be used: {ended.reason}")
    return ended.result


class _Ended(NamedTuple):
    """How a process ended. `exit_code`: None = it was stopped as its time was over. `result`: as far as it came."""

    exit_code: int | None
    result: dict[str, Any]
    log: list[str]
    reason: str


def _run(task: Task, seconds: float | None) -> _Ended:
    """scripts/benchmarks/training_contenders.py in a process of its own, with empty caches, without a hub, on one GPU."""
    task.folder.mkdir(parents=True)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": gpus.split(",")[0],
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(task.folder / "datasets"),
        "TORCHINDUCTOR_CACHE_DIR": str(task.folder / "inductor"),
        "TRITON_CACHE_DIR": str(task.folder / "triton"),
    }
    result = task.folder / "result.json"
    with (task.folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        with running("training_contenders", task.to_json(), log, environment) as child:
            exit_code: int | None = None
            try:
                exit_code = child.wait(seconds)
            except subprocess.TimeoutExpired:
                end(child)
        known = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        reason = known.pop("reason", None) or last_words(log, exit_code or 0)
        if exit_code is not None and exit_code < 0:
            reason = f"ended by signal {-exit_code}; its last words: {reason}"
        return _Ended(exit_code, known, words(log), reason)
