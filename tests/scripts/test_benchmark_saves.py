"""scripts/benchmark.py saves: every save is timed until its checkpoint has its name, with the bytes of its files."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

SAVES = 2
ADAMW = 3 * 4
"""Bytes per parameter: the weight and two moments in float32."""


def test_each_save_is_timed_until_it_is_complete(
    benchmark: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    disk, file = tmp_path / "disk", tmp_path / "saves.json"
    disk.mkdir()
    options = ["--config", "tiny", "--saves", SAVES, "--steps-between", 2, "--disk", disk, "--json", file]
    result = benchmark("saves", *options)
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [save["step"] for save in record["saves"]] == [4, 6]  # that of step 2 is not counted
    assert len(record["step_seconds"]) == 6
    for save in record["saves"]:
        assert 0 < save["weights"] + save["optimizer"] <= save["stall"]
        assert save["complete"] > 0
        assert ADAMW * record["parameters"] < save["bytes"] < ADAMW * record["parameters"] + 1e6
    for name, measurements in (("janus-sft", record["saves"]), ("the same bytes", record["bare"])):
        row = next(line for line in result.stdout.splitlines() if line.startswith(f"| {name}"))
        ratio = statistics.median(save["stall"] / save["complete"] for save in measurements)
        assert row.endswith(f"| {ratio:.2f} |")
    assert all(write["stall"] <= write["complete"] for write in record["bare"])
    assert list(disk.iterdir()) == []


def test_a_disk_that_is_missing_is_an_error(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"--disk {tmp_path / 'nowhere'}: there is no such folder" in refused("saves", "--disk", tmp_path / "nowhere")
