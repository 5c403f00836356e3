"""scripts/benchmark.py start: every phase is the user's own command, and the table has the medians."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scripts() -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        import benchmark
        from benchmarks import start
    return SimpleNamespace(main=benchmark.main, start=start)


def test_each_phase_is_measured_and_the_last_one_resumes(
    scripts: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []
    measure = scripts.start.measure

    def noted(command: list[str], folder: Path) -> dict[str, float]:
        usage = measure(command, folder)
        log = (folder / "log.txt").read_text(encoding="utf-8")
        commands.append((command[-1], log))
        return usage

    monkeypatch.setattr(scripts.start, "measure", noted)
    record, plot = tmp_path / "start.json", tmp_path / "start.png"
    assert scripts.main(["start", "--rows", "60", "--repeat", "1", "--json", str(record), "--plot", str(plot)]) == 0
    logs = dict(commands[3:])
    assert [command for command, _ in commands] == [scripts.start._IMPORT, "--check", "--check", *logs]
    assert "resuming from" in logs["training.max_steps=2"]
    assert "resuming from" not in logs["training.max_steps=1"]
    measurements = json.loads(record.read_text(encoding="utf-8"))["measurements"]
    assert [run["phase"] for run in measurements] == [scripts.start.IMPORTS, *scripts.start.PHASES]
    assert all(run["process_seconds"] > 0 and run["peak_memory"] > 50e6 for run in measurements)
    assert plot.stat().st_size > 5_000
    assert "| one step | 60 |" in capsys.readouterr().out


def test_medians_of_each_phase(scripts: SimpleNamespace) -> None:
    phase, seconds = "one step", (3.0, 1.0, 2.0, 9.0)
    runs = [
        {"phase": phase, "rows": rows, "process_seconds": value, "cpu_seconds": 2 * value, "peak_memory": 1e9}
        for rows, value in zip((10, 10, 10, 1_000), seconds, strict=True)
    ]
    medians = scripts.start.compute_medians(runs)
    assert [(line["rows"], line["process_seconds"], line["cpu_seconds"]) for line in medians] == [
        (10, 2.0, 4.0),
        (1_000, 9.0, 18.0),
    ]
    assert "| one step | 1,000 | 9.0 | 18.0 | 1.00 GB |" in scripts.start.format_medians(medians)


def test_a_command_that_fails_is_one_error(scripts: SimpleNamespace, tmp_path: Path) -> None:
    from train.errors import UserError

    with pytest.raises(UserError, match="no such thing"):
        scripts.start.measure([sys.executable, "-c", "raise SystemExit('error: no such thing')"], tmp_path)
