"""Tasks of lm-evaluation-harness on data of ours."""

from pathlib import Path
from typing import Any


def multiple_choice(name: str, data: Path) -> dict[str, Any]:
    """A task of questions with choices. `data`: lines with `question`, `choices` and the number of the `answer`."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
