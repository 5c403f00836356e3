"""Records of a benchmark: the machine, the package versions, and the JSON file."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from train.errors import UserError
from train.preflight.json_report import write_json


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_json_file(file: Path | None) -> None:
    """Raise UserError if the folder of `--json` doesn't exist, or the file does: no record is lost."""
    if file and not file.parent.is_dir():
        raise UserError(f"--json {file}: there is no folder {file.parent}")
    if file and file.exists():
        raise UserError(f"--json {file}: it exists already, and is not replaced. Name another file, or delete it.")


def describe_environment(packages: Sequence[str]) -> dict[str, Any]:
    """Return `machine` (CPU, cores, memory, Python, kernel, current load) and `versions` (None: not installed)."""
    cpu = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        lines = (line.partition(":") for line in cpu_info.read_text("utf-8").splitlines())
        cpu = next((value.strip() for key, _, value in lines if key.strip() == "model name"), cpu)
    machine = {
        "cpu": cpu,
        "cores": count_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),
    }
    return {"machine": machine, "versions": {package: _version(package) for package in packages}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def format_environment(environment: dict[str, Any]) -> str:
    """Return machine and package versions as one line of Markdown."""
    machine = environment["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return (
        f"Machine: {machine['cores']} cores of {machine['cpu']}, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}, Python {machine['python']} (load before the run: {machine['load_before']}). "
        f"Packages: {packages}."
    )


def publish(table: str, environment: dict[str, Any], record: dict[str, Any], file: Path | None) -> None:
    """Print the table and the environment; write them with all measurements to `file`, if there is one."""
    print(f"\n{table}\n\n{format_environment(environment)}")
    if file:
        write_json({**record, **environment}, file)
        print(f"every measurement is in {file}")
