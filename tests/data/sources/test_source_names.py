"""Names of sources: short and unique."""

from pathlib import Path

import pytest

from train.data.sources.names import name_sources
from train.recipe import Source


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with files of the same name, a compressed one and a folder of files."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/rows.jsonl", "b/rows.jsonl", "mix.v1.JSONL.gz", "set-1.5/train.jsonl", "plain"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/rows.jsonl", "mix.v1.JSONL.gz", "set-1.5", "plain"], ["rows", "mix.v1", "set-1.5", "plain"]),
        (["a/rows.jsonl", "b/rows.jsonl", "plain"], ["a/rows.jsonl", "b/rows.jsonl", "plain"]),
        (["a/*.jsonl", "allenai/tulu-v2.5", "name"], ["a/*.jsonl", "allenai/tulu-v2.5", "name"]),
        (["plain", "plain"], ["plain[train] 1", "plain[train] 2"]),
        (["."], ["."]),
    ],
)
def test_a_source_has_the_shortest_name_that_no_other_has(folder: Path, paths: list[str], names: list[str]) -> None:
    assert name_sources([Source(path=path) for path in paths]) == names


def test_parts_of_one_data_set_are_named_by_configuration_and_split() -> None:
    parts = [("one", "train"), (None, "train"), (None, "test"), (None, "test")]
    sources = [Source(path="owner/set", name=name, split=split) for name, split in parts]
    assert name_sources(sources) == [
        *("owner/set:one[train]", "owner/set[train]", "owner/set[test] 3", "owner/set[test] 4"),
    ]
