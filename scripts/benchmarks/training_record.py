"""JSON file of `benchmark.py train`, which later calls continue."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.training_contenders import Contender, Workload, all_contenders, default_contenders
from benchmarks.training_table import speed_ratios, summarize
from train.errors import UserError
from train.preflight.json_report import write_json

_KEYS = ("command", "settings", "calls", "measurements")  # the table follows from them


class Record:
    """JSON file with the measurements of this call and of earlier ones."""

    def __init__(self, file: Path, workload: Workload, call: dict[str, Any]) -> None:
        """Add `call` (machine, versions, device) to the file. Raises UserError if the file can't be continued."""
        self._file = file
        self.content: dict[str, Any] = {
            "command": "train", "settings": asdict(workload), "calls": [], "measurements": []
        }  # fmt: skip
        if file.exists():
            self.content = read_record(file)
            self._refuse_changes(workload, call)
        self.content["calls"].append(call)
        self._save()  # an unwritable file is reported now, not after minutes

    @property
    def device(self) -> dict[str, Any]:
        """The device of this call."""
        device: dict[str, Any] = self.content["calls"][-1]["device"]
        return device

    def has(self, contender: Contender) -> bool:
        """Return whether the contender was measured or failed with its current settings.

        One that lacked its attention kernel is tried again, as the kernel may have been installed.
        """
        return any(
            (measurement["name"], measurement["settings"]) == (contender.name, contender.settings())
            and not measurement.get("refused")
            for measurement in self.content["measurements"]
        )

    def add(self, measurement: dict[str, Any]) -> None:
        """Add a measurement, replace an earlier one of the same name, and write the file."""
        kept = [other for other in self.content["measurements"] if other["name"] != measurement["name"]]
        self.content["measurements"] = [*kept, {**measurement, "call": len(self.content["calls"]) - 1}]
        self._save()

    def table(self) -> list[dict[str, Any]]:
        """Return the lines of the table, in the order of the default contenders, then of the others."""
        names = dict.fromkeys(contender.name for contender in [*default_contenders(None), *all_contenders()])
        order = {name: index for index, name in enumerate(names)}
        ordered = sorted(self.content["measurements"], key=lambda line: order.get(line["name"], len(order)))
        return [summarize(line, self.content["calls"][line["call"]]["device"]["peak_flops"]) for line in ordered]

    def _save(self) -> None:
        table = self.table()
        write_json({**self.content, "table": table, "ratios": speed_ratios(table)}, self._file)

    def _refuse_changes(self, workload: Workload, call: dict[str, Any]) -> None:
        """Raise UserError if settings, device or package versions differ from those of the file."""
        before, prefix = self.content, f"--json {self._file}: it was measured"
        remedy = "Measurements of both can't share a table: name another file."
        if changed := [key for key, value in asdict(workload).items() if before["settings"].get(key) != value]:
            raise UserError(f"{prefix} with other settings ({', '.join(changed)}). {remedy}")
        for earlier in before["calls"]:
            if (device := earlier["device"]["device"]) != call["device"]["device"]:
                raise UserError(f"{prefix} on {device}, this is {call['device']['device']}. {remedy}")
            for package, version in call["versions"].items():
                other = earlier["versions"].get(package)
                if version and other and version != other:
                    raise UserError(f"{prefix} with {package} {other}, installed is {version}. {remedy}")


def read_record(file: Path) -> dict[str, Any]:
    """Read an earlier record. Raises UserError for any other file."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--json {file}: it can't be read: {error}. Name another file.") from error
    if not isinstance(content, dict) or content.get("command") != "train" or not content.keys() >= set(_KEYS):
        raise UserError(f"--json {file}: it holds no measurements of `train` and is not replaced. Name another file.")
    return {key: content[key] for key in _KEYS}
