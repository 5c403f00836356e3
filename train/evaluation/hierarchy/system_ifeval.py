"""S-IFEval in the table of settings: constraints in the system message and in the user turn, from ifeval.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.evaluation.hierarchy.results_of_set import TablePart
from train.evaluation.measured_models import is_same_model
from train.resampling import Estimate

_TURNS = {"system": "S-IFEval: constraints in the system message", "user": "S-IFEval: the same in the user turn"}


def read_gap(folder: Path, model: str, model_files: str | None) -> tuple[list[TablePart], str]:
    """Return the strict shares of prompts that `evaluate.py ifeval` measured of this model, and their difference.

    Empty without an ifeval.json of the model and its files, with the reason if there is one of another model, or
    without the same constraints in the user turn. `model_files`: as `AnswerOptions.model_files` returns it.
    """
    try:
        record = json.loads((folder / "ifeval.json").read_text(encoding="utf-8"))
        if record["kind"] != "ifeval" or "gap" not in record:
            return [], ""
        is_same = is_same_model(record["model"], model)
        if not is_same or record.get("model_files", model_files) != model_files:
            whose = f"other files of the model {model}" if is_same else f"the model {record['model']}"
            return [], f"S-IFEval is not in the table: ifeval.json is of {whose}."
        shares = {turn: record[turn]["prompt_strict"] for turn in _TURNS}
        gap = Estimate(**record["gap"]["prompt_strict"])
        return [
            TablePart(name, shares[turn]["of"], _estimate(shares[turn]), difference=gap if turn == "system" else None)
            for turn, name in _TURNS.items()
        ], ""
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or one of another version
        return [], ""


def _estimate(share: Mapping[str, Any]) -> Estimate:
    return Estimate(share["value"], share["low"], share["high"], 1.0, share["prompts"], share["interval"])
