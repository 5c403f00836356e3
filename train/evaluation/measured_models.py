"""Models of the results in a folder, for reports and warnings: results of two models would look like those of one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.evaluation.results.kinds import KINDS

HEADING = "## Results of several models"


def measured_models(folder: Path) -> dict[str, str]:
    """Return kind -> model of the results in a folder. Files that can't be read, or name no model, are left out."""
    models = {}
    for name, kind in KINDS.items():
        try:
            record = json.loads((folder / kind.file).read_text(encoding="utf-8"))
            if isinstance(record, dict) and kind.matches(record) and (model := _model_of(record)):
                models[name] = model
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return models


def _model_of(record: Mapping[str, Any]) -> str | None:
    if "models" not in record:
        return record.get("model")
    models = record["models"]  # gain: of the model after training, or of the only one
    return str((models.get("after") or next(iter(models.values())))["model"])


def is_same_model(first: str, second: str) -> bool:
    """Return whether two names are one model: equal, or two paths of one folder."""
    return first == second or (Path(first).is_dir() and Path(second).is_dir() and Path(first).samefile(second))


def describe_several(models: Mapping[str, str], quote: str = "") -> str:
    """Return `hierarchy of a, turns of b` for kinds of different models; empty if all are of one model."""
    names = list(models.values())
    if all(is_same_model(names[0], name) for name in names[1:]):
        return ""
    return ", ".join(f"{kind} of {quote}{model}{quote}" for kind, model in models.items())


def warn_of_other_models(folder: Path, model: str) -> None:
    """Print a warning if the folder has results of another model than `model`, which a command is about to measure."""
    others = {kind: name for kind, name in measured_models(folder).items() if not is_same_model(name, model)}
    if others:
        listed = ", ".join(f"{kind} of {name}" for kind, name in others.items())
        print(
            f"warning: {folder} has results of another model: {listed}. This run is of {model}. To keep them apart, "
            "name another folder: --output-dir FOLDER.",
            flush=True,
        )


def several_models_section(folder: Path) -> str:
    """Return the section of report.md on results of several models; empty if they are of one model."""
    if not (listed := describe_several(measured_models(folder), quote="`")):
        return ""
    return f"{HEADING}\n\nThese results are of several models: {listed}. Don't read them as results of one.\n"
