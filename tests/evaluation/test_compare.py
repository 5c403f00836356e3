"""scripts/evaluate.py compare: differences recomputed from the rows, and refused comparisons."""

import json
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from plain_intervals import plain_interval
from safetensors.torch import load_file, save_file
from scripted_server import Asked, Reply, said, served

from train.evaluation.compare import MeasurePair, compare_results, plot_pairs
from train.evaluation.results import Measure, Results

ROOT = Path(__file__).parents[2]
OURS = ROOT / "recipes" / "smollm2-135m" / "data"
LONG = "outputs/a-model-with-a-name-of-its-own/" + "and-a-longer-one" * 8
TEMPERATURES = {"max_tokens": 64, "temperature": 0.0}


async def rambles(asked: Asked) -> Reply:
    return said("Well, here is an answer, and another entry, good and very long because I make it so.")


async def is_careful(asked: Asked) -> Reply:
    """Follow some more rules: no comma, a title, and capitals depending on the prompt's length."""
    text = "<<A title>> a river in the morning with water and patience"
    return said(text.upper() if len(asked.prompt) % 2 else text)


@pytest.fixture(scope="module")
def sides(command: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of S-IFEval on our own rows, of two scripted models."""
    folders = (tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b"))
    for folder, script in zip(folders, (rambles, is_careful), strict=True):
        with served(script, models=["judge"]) as server:
            assert command(
                "ifeval", "--model", folder.name, "--server", server.url, "--data", OURS / "system_ifeval.jsonl",
                "--control", OURS / "system_ifeval_user.jsonl", "--limit", "40", "--output-dir", folder,
            ) == 0  # fmt: skip
    return folders


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compared(folder: Path) -> dict[tuple[str, str], dict]:
    record = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    return {(entry["kind"], entry["measure"]): entry for entry in record["measures"]}


def test_the_difference_is_that_of_the_rows(
    command: Callable[..., int], sides: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sides
    capsys.readouterr()
    assert command("compare", first, second) == 0
    shown = capsys.readouterr().out
    entries = compared(second)
    strict = [
        {(entry["turn"], entry["key"]): entry["strict"] for entry in lines(folder / "ifeval_answers.jsonl")}
        for folder in sides
    ]
    for turn in ("system", "user"):
        keys = [key for key in strict[0] if key[0] == turn]
        by_prompt = [[all(strict[1][key]) - all(strict[0][key])] for key in keys]
        by_constraint = [[b - a for a, b in zip(strict[0][key], strict[1][key], strict=True)] for key in keys]
        for name, values in (("prompts, strict", by_prompt), ("constraints, strict", by_constraint)):
            flat = [number for entry in values for number in entry]
            entry = entries["ifeval", f"{turn}: {name}"]
            assert entry["paired"]["mean"] == pytest.approx(sum(flat) / len(flat))
            assert entry["change"] == pytest.approx(entry["b"]["value"] - entry["a"]["value"])
            assert entry["paired"]["mean"] == pytest.approx(entry["change"])
            assert (entry["paired"]["low"], entry["paired"]["high"]) == pytest.approx(
                plain_interval(values, 4), abs=0.03
            )
            assert entry["rows"] == 40
    better = entries["ifeval", "system: constraints, strict"]
    assert better["paired"]["low"] > 0
    assert better["paired"]["p"] < 0.01
    rule = "punctuation:no_comma"
    follows = [
        {key: entry["strict"][entry["instruction_id_list"].index(rule)] for entry in lines(folder / "ifeval_answers.jsonl")
         if rule in entry["instruction_id_list"] for key in [(entry["turn"], entry["key"])] if key[0] == "system"}
        for folder in sides
    ]  # fmt: skip
    entry = entries["ifeval", f"system: {rule}"]
    assert entry["rows"] == len(follows[0]) > 3
    assert entry["paired"]["mean"] == pytest.approx(
        sum(follows[1][key] - follows[0][key] for key in follows[0]) / entry["rows"]
    )
    gap = entries["ifeval", "system less user: prompts, strict"]
    gaps = [
        (all(strict[1]["system", key]) - all(strict[1]["user", key]))
        - (all(strict[0]["system", key]) - all(strict[0]["user", key]))
        for turn, key in strict[0]
        if turn == "system"
    ]
    assert gap["paired"]["mean"] == pytest.approx(sum(gaps) / 40)
    assert "| ifeval: system: constraints, strict | " in shown
    assert "punctuation:no_comma" not in shown
    assert (second / "compare.png").read_bytes().startswith(b"\x89PNG")
    section = (second / "report.md").read_text(encoding="utf-8").partition("## Two models side by side\n\n")[2]
    assert section.startswith(shown[: shown.index("figures: ")].rstrip())
    assert "](compare.png)" in section
    assert (
        command("compare", first / "ifeval.json", second / "ifeval.json", "--details", "--output-dir", first / "new")
        == 0
    )
    assert "| ifeval: system: punctuation:no_comma | " in capsys.readouterr().out
    assert compared(first / "new") == entries


def test_the_bootstrap_resamples_groups_of_rows() -> None:
    """Ten groups of six rows with equal differences within a group, and rows with several numbers."""
    rng = random.Random(6)
    differences = [rng.choice([-1.0, 0.0, 1.0, 1.0]) for _ in range(10)]
    rows = {f"{group}.{row}": (0.5, 0.5) for group in range(10) for row in range(6)}
    better = {row: (0.5 + differences[int(row[0])],) * 2 for row in rows}
    groups = {row: row[0] for row in rows}
    sides = [
        {"k": Results("k", Path("k"), "m", {"n": Measure(0.0, None, None, rows=kept, groups=groups)}, {}, {})}
        for kept in (rows, better)
    ]
    [pair] = compare_results(*sides).pairs
    assert pair.rows == 60
    assert pair.difference.mean == pytest.approx(sum(differences) / 10)
    low, high = plain_interval([[difference] * 12 for difference in differences], 4)
    assert (pair.difference.low, pair.difference.high) == pytest.approx((low, high), abs=0.11)
    assert high - low > 0.6


def test_equal_results_have_the_score_interval_of_their_number_of_rows(
    command: Callable[..., int], sides: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For n equal pairs, Tango's score interval (1998) is z^2 / (n + z^2) on both sides, and never [0, 0]."""
    shutil.copytree(sides[0], tmp_path / "copy")
    assert command("compare", sides[0], tmp_path / "copy", "--details") == 0
    shown = capsys.readouterr().out
    entries = compared(tmp_path / "copy")
    assert {entry["rows"] for entry in entries.values()} >= {1, 40}
    for entry in entries.values():
        assert (entry["change"], entry["paired"]["mean"], entry["paired"]["p"]) == (0, 0, 1)
        if entry["rows"] < 6:
            assert (entry["paired"]["low"], entry["paired"]["high"]) == (None, None)
        else:
            most = 2 if entry["unit"] == "points" else 1
            ends = pytest.approx(
                (-most * 1.96**2 / (entry["rows"] + 1.96**2), most * 1.96**2 / (entry["rows"] + 1.96**2)), abs=1e-4
            )
            assert (entry["paired"]["low"], entry["paired"]["high"]) == ends
    assert "| +0.0 [-8.8, +8.8] | 1.0000 | 40 |" in shown
    assert "| +0.0 (n = 1) | 1.0000 | 1 |" in shown
    assert "[+0.0, +0.0]" not in shown


def test_the_same_results_or_missing_folders_are_an_error(
    says_no: Callable[..., str], sides: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, side in zip(("baseline", "trained-model"), sides, strict=True):
        shutil.copytree(side, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    missing = f"there is no such folder or file: there is no {{}} in {tmp_path}. Did you mean {{}}?"
    for first, second, typo, meant in (
        ("baselin", "trained-model", "baselin", "baseline"),
        ("baseline", "traind_model", "traind_model", "trained-model"),
        ("base-line", "traind_model", "base-line", "baseline"),
    ):
        assert says_no("compare", first, second).startswith(f"{typo}: {missing.format(typo, meant)}")
    same = "A and B are the same results"
    assert same in says_no("compare", "trained-model", "trained-model")
    assert same in says_no("compare", "trained-model", tmp_path / "trained-model")
    assert same in says_no("compare", "trained-model/ifeval.json", "trained-model")
    (tmp_path / "nothing").mkdir()
    assert says_no("compare", "nothing", "trained-model").startswith("nothing: has no results (any of gain")
    write_rules(tmp_path / "nothing", [True] * 8)
    other = "A and B have no kind of results in common: A has rules, B has ifeval"
    assert other in says_no("compare", "nothing", "trained-model")


def test_results_with_other_settings_or_rows_are_refused(
    command: Callable[..., int], says_no: Callable[..., str], sides: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first, second = sides
    record = json.loads((second / "ifeval.json").read_text(encoding="utf-8"))

    def changed(**sections: dict) -> Path:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(second, folder)
        new = {
            name: value | sections.get(name, {}) if isinstance(value, dict) else value for name, value in record.items()
        }
        (folder / "ifeval.json").write_text(json.dumps(new), encoding="utf-8")
        return folder

    assert "ifeval: max_new_tokens is 1280 and 256" in says_no(
        "compare", first, changed(decoding={"max_new_tokens": 256})
    )
    assert "ifeval: data: contents differ. " in says_no("compare", first, changed(data={"fingerprint": "another"}))
    fewer = says_no("compare", first, changed(data={"fingerprint": "another", "prompts": 2, "control": None}))
    assert f"ifeval: data: prompts is {record['data']['prompts']} and 2, control is true and false. " in fewer
    stale = changed()
    shutil.copy(first / "ifeval_answers.jsonl", stale)
    assert "belong to another run" in says_no("compare", first, stale)
    # Another version of the checkers keeps no one from comparing, and is said; so are answers that never came.
    unanswered = {**record["system"]["endings"], "no answer": 3}
    other = changed(
        checkers={"lm_eval": "0.4.99"}, respondent={"system_role": "merge_into_user"}, system={"endings": unanswered}
    )
    assert command("compare", first, other) == 0
    shown = capsys.readouterr().out
    assert 'note: ifeval: lm_eval is "0.4.13" and "0.4.99"' in shown
    assert 'note: ifeval: system_role is "native" and "merge_into_user"' in shown
    assert "note: ifeval: without an answer, system turn is 0 and 3" in shown
    assert "no such folder" in says_no("compare", first, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no results" in says_no("compare", first, tmp_path / "empty")
    (tmp_path / "x.json").write_text("[1]", encoding="utf-8")
    assert "not a result" in says_no("compare", first, tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"kind": "ifeval"}', encoding="utf-8")
    assert "cannot be read as results" in says_no("compare", first, tmp_path / "x.json")
    assert "nothing of --only gain" in says_no("compare", first, second, "--only", "gain")


@pytest.mark.parametrize(("measures", "name"), [(1, "b"), (2, LONG), (6, "b"), (40, LONG)], ids=[1, 2, 6, 40])
def test_the_legend_of_the_plot_covers_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measures: int, name: str
) -> None:
    measure = Measure(0.4, 0.3, 0.5)
    kinds = ("ifeval", "gain", "harness")
    pairs = [
        MeasurePair(kinds[number % 3], f"{name}: {number}", measure, Measure(1.0, None, None), None, None)
        for number in range(measures)
    ]
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    plot_pairs(pairs, (name, name), tmp_path / "compare.png")
    [figure] = figures
    monkeypatch.undo()
    figure.canvas.draw()
    [legend] = figure.legends
    covered = legend.get_window_extent()
    width, height = figure.canvas.get_width_height()
    assert 0 <= covered.x0 < covered.x1 <= width
    assert 0 <= covered.y0 < covered.y1 <= height
    assert len(figure.axes) == min(measures, 3)
    for axes in figure.axes:
        assert not covered.overlaps(axes.get_tightbbox())  # with its title, names of measures and axis label
        assert axes.get_tightbbox().x0 >= 0
        assert axes.get_title(loc="left")
        assert axes.get_xlabel()
    assert figure.get_suptitle()
    plt.close(figure)


def gain_record(gain: float, **options: object) -> dict:
    overall = {
        name: {"mean": gain, "low": gain - 0.1, "high": gain + 0.1, "p": 0.01}
        for name in ("gain", "accuracy", "gain_over_none", "accuracy_over_none")
    }
    chosen = {"template": None, "system_role": "native", "others": 2, "limit": None, "seed": 0} | options
    model = {"model": "m", "overall": {"rows": 138, "instructions": 36} | overall}
    return {"data": ["a/held_out.jsonl"], "left_out": {}, "options": chosen, "models": {"after": model}}


def write_rules(folder: Path, obeys: list[bool], max_new_tokens: int = 96, rules: str = "a") -> None:
    """Two rules of three rows each, none obeyed before training. Rows may be duplicates."""
    counts: dict[str, dict[str, int]] = {}
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as out:
        for number, follows in enumerate(obeys):
            rule = f"rule_{number % 2}"
            asked = number - 2 if number > 3 else number  # the last two ask again what the two before them do
            messages = [{"role": role, "content": f"{role} {asked}"} for role in ("system", "user")]
            row = {
                "messages": messages,
                "rule": rule,
                "held_out": "wording",
                "answers": ["", ""],
                "obeys": [False, follows],
            }
            out.write(json.dumps(row) + "\n")
            entry = counts.setdefault(rule, {"rows": 0, "before": 0, "after": 0})
            entry["rows"] += 1
            entry["after"] += follows
    record = {"asked": {"max_new_tokens": max_new_tokens, "rules": rules}, "wording": counts}
    (folder / "adherence.json").write_text(json.dumps(record), encoding="utf-8")


def write_bench(folder: Path, scores: list[float | None], runs: int = 3) -> None:
    there = [score for score in scores if score is not None]
    overall = {"mean": sum(there) / len(there), "low": 1.0, "high": 5.0, "scored": len(there), "of": len(scores)}
    record = {
        "model": folder.name, "data": ["bench.jsonl"], "rows": len(scores), "judge": {"model": "j", "runs": runs},
        "decoding": TEMPERATURES, "system_message_given": True, "score": overall, "by_source": {"koala": overall},
        "by_dimension": {"style": overall},
    }  # fmt: skip
    (folder / "bench.json").write_text(json.dumps(record), encoding="utf-8")
    rows = (
        json.dumps({"id": str(number), "prompt": "p", "judge": "j", "score": score}) + "\n"
        for number, score in enumerate(scores)
    )
    (folder / "bench_rows.jsonl").write_text("".join(rows), encoding="utf-8")


def write_harness(folder: Path, right: list[bool], few_shot: int = 0, system_role: str = "native") -> None:
    """A group of two tasks with half of the documents each."""
    half = len(right) // 2
    rows = [
        {"task": f"task_{number >= half}", "document": number, "hash": str(number), "prompt": "p", "filter": "none", "scores": {"acc": float(entry)}}
        for number, entry in enumerate(right)
    ]  # fmt: skip
    scores = [
        {"task": task, "metric": "acc", "value": sum(part) / len(part), "stderr": 0.1, "low": 0.0, "high": 1.0,
         "of": len(part), "few_shot": few_shot, "version": "1", "leaves": leaves}
        for task, part, leaves in (
            ("both", right, ["task_False", "task_True"]),
            ("task_False", right[:half], ["task_False"]),
            ("task_True", right[half:], ["task_True"]),
        )
    ]  # fmt: skip
    record = {"kind": "harness", "model": folder.name, "lm_eval": "0.4.13", "scores": scores,
              "options": {"system_instruction": None, "dtype": None, "system_role": system_role}}  # fmt: skip
    (folder / "harness.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "harness_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_all_kinds_in_one_table(
    command: Callable[..., int], says_no: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(2)
    folders = [tmp_path / "a", tmp_path / "b"]
    obeys = [[False, True, False, False, True, False], [True, True, False, True, True, True]]
    scores = [[3.0, 2.0, None, 4.0], [4.0, 4.0, 5.0, 4.5]]
    right = [[rng.random() < share for _ in range(40)] for share in (0.3, 0.7)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "gain.json").write_text(json.dumps(gain_record(0.5 + number)), encoding="utf-8")
        write_rules(folder, obeys[number])
        write_bench(folder, scores[number])
        write_harness(folder, right[number])
    assert command("compare", *folders, "--details") == 0
    shown = capsys.readouterr().out
    entries = compared(folders[1])
    assert {kind for kind, _ in entries} == {"gain", "rules", "bench", "harness"}
    gain = entries["gain", "gain"]
    assert (gain["change"], gain["paired"], gain["rows"]) == (1.0, None, None)
    assert "No interval: a side kept no rows of this figure." in shown
    rules = entries["rules", "held-out wordings"]
    assert (rules["change"], rules["paired"]["mean"], rules["rows"]) == (pytest.approx(3 / 6), pytest.approx(3 / 6), 6)
    # The row that one side has no score for is no pair: the difference is that of the other three.
    bench = entries["bench", "score"]
    assert bench["paired"]["mean"] == pytest.approx((1.0 + 2.0 + 0.5) / 3)
    assert bench["rows"] == 3
    assert bench["change"] == pytest.approx(17.5 / 4 - 3)
    both = entries["harness", "both: acc"]
    assert both["rows"] == 40
    assert both["paired"]["mean"] == pytest.approx((sum(right[1]) - sum(right[0])) / 40)
    assert entries["harness", "task_True: acc"]["rows"] == 20
    assert "| bench: source: koala | " in shown

    (folders[1] / "gain.json").write_text(json.dumps(gain_record(2.0, others=5)), encoding="utf-8")
    write_rules(folders[1], obeys[1], max_new_tokens=8)
    write_bench(folders[1], scores[1], runs=1)
    write_harness(folders[1], right[1], few_shot=5)
    said = says_no("compare", *folders)
    for error in (
        "gain: others is 2 and 5",
        "rules: max_new_tokens is 96 and 8",
        "bench: judge runs is 3 and 1",
        "harness: few-shot examples: both is 0 and 5, task_False is 0 and 5, task_True is 0 and 5",
    ):
        assert error in said
    write_rules(folders[1], obeys[1][:4])
    rows = says_no("compare", *folders, "--only", "rules")
    assert "rules: rows: rule_0 (held-out wordings) is 3 and 2, rule_1 (held-out wordings) is 3 and 2. " in rows
    write_rules(folders[1], obeys[1])
    answers = folders[1] / "answers.jsonl"
    answers.write_text(answers.read_text(encoding="utf-8").replace("user 3", "user 33"), encoding="utf-8")
    assert "rules: rows: contents differ. " in says_no("compare", *folders, "--only", "rules")
    write_rules(folders[1], obeys[1], rules="b")
    write_harness(folders[1], right[1], system_role="turn")
    capsys.readouterr()
    assert command("compare", *folders, "--only", "rules", "harness") == 0
    shown = capsys.readouterr().out
    assert "note: rules: checks differ (A and B)" in shown
    assert 'note: harness: system_role is "native" and "turn"' in shown
    (folders[0] / "adherence.json").unlink()
    (folders[1] / "bench.json").unlink()
    assert "A and B have no kind of results in common" in says_no(
        "compare", folders[0] / "bench.json", folders[1] / "adherence.json"
    )
    capsys.readouterr()
    (folders[1] / "gain.json").write_text(json.dumps(gain_record(2.0)), encoding="utf-8")
    assert command("compare", *folders, "--only", "gain", "rules", "bench") == 0
    shown = capsys.readouterr().out
    assert "note: rules: only B has it" in shown
    assert "note: bench: only A has it" in shown


def test_settings_that_an_older_file_lacks_become_notes(
    command: Callable[..., int], says_no: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        write_bench(folder, [3.0, 4.0])
        write_rules(folder, [True] * 8)
        write_harness(folder, [True] * 8)
    adherence = json.loads((folders[0] / "adherence.json").read_text(encoding="utf-8"))
    del adherence["asked"]["max_new_tokens"]
    (folders[0] / "adherence.json").write_text(json.dumps(adherence), encoding="utf-8")
    harness = json.loads((folders[1] / "harness.json").read_text(encoding="utf-8"))
    harness["options"]["system_instruction"] = "Be brief."
    (folders[1] / "harness.json").write_text(json.dumps(harness), encoding="utf-8")
    assert command("compare", *folders) == 0
    shown = capsys.readouterr().out
    assert "note: rules: not recorded for A, so it may differ: max_new_tokens" in shown
    assert 'note: harness: system_instruction is null and "Be brief."' in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("note: bench: ")]
    assert line.startswith("note: bench: not recorded for A and B, so it may differ: contents of the rows, judge sees")
    assert "judge prompt_version" not in line  # both are of the first
    assert "judge temperature" in line
    assert "judge runs" not in line


def test_benches_of_another_protocol_or_other_rows_are_refused(
    command: Callable[..., int], says_no: Callable[..., str], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (OURS / "bench.jsonl").read_text("utf-8").splitlines()[:2]]
    other = [rows[0], {**rows[1], "reference_answer": "Another reference."}]
    given = [{"system": row["system"], "prompt": row["prompt"], "responses": ["Well.", "No idea."]} for row in rows]
    for name, lines in (("data", rows), ("other", other), ("given", given)):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "bench.jsonl").write_text(text, encoding="utf-8")

    def measured(name: str, data: str, *options: str) -> Path:
        assert command(
            "bench", "--model", "m", "--responses", tmp_path / "given" / "bench.jsonl", "--data",
            tmp_path / data / "bench.jsonl", "--judge", "judge", "--judge-server", server.url, "--best-of", "2",
            "--runs", "2", "--output-dir", tmp_path / name, *options,
        ) == 0  # fmt: skip
        return tmp_path / name

    with served(answers_or_grades) as server:
        first = measured("first", "data")
        assert command("compare", first, measured("same", "data")) == 0
        for folder, error in (
            (measured("picked", "data", "--pick-by", "all-runs"), 'bench: picked by is "first run" and "all runs"'),
            (measured("cooler", "data", "--judge-temperature", "0.5"), "bench: judge temperature is 1.0 and 0.5"),
            (measured("rows", "other"), "bench: contents of the rows differ. "),
        ):
            assert error in says_no("compare", first, folder)


async def answers_or_grades(asked: Asked) -> Reply:
    """The models answer with their name; the judge's grade depends on it and on the question."""
    if asked.body["model"] != "judge":
        return said(f"I am {asked.body['model']}.")
    grade = 1 + (len(asked.prompt.partition("### Criterion")[2]) + 2 * ("I am b." in asked.prompt)) % 5
    return said(f"[RESULT] {grade}")


def test_files_of_gain_and_bench_are_compared_by_rows(
    command: Callable[..., int], says_no: Callable[..., str], tiny_chat_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Real files of both commands: paired differences are means over the rows, wins follow from the scores."""
    data = tmp_path / "rows.jsonl"
    systems = ("Be a river.", "Be a stone.", "Be a paper window.")
    rows = [{"system": systems[row % 3], "prompt": f"q {row // 3}", "output": f"{row} river"} for row in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folders = [tmp_path / "a", tmp_path / "b"]
    with served(answers_or_grades, models=["judge"]) as server:
        for folder in folders:
            shutil.copytree(tiny_chat_model, folder)
            if folder.name == "b":
                weights = load_file(folder / "model.safetensors")
                scaled = {name: value * 1.1 for name, value in weights.items()}
                save_file(scaled, folder / "model.safetensors", {"format": "pt"})
            assert command("gain", "--model", folder, "--data", data) == 0
            assert command(
                "bench", "--model", folder.name, "--server", server.url, "--judge", "judge", "--judge-server", server.url,
                "--runs", "1", "--data", OURS / "bench.jsonl", "--output-dir", folder,
            ) == 0  # fmt: skip
    capsys.readouterr()
    assert command("compare", *folders) == 0
    shown = capsys.readouterr().out
    entries = compared(folders[1])
    gains = [
        [line[name]["gain"] for line in lines(folder / "gain_rows.jsonl")]
        for folder, name in zip(folders, "ab", strict=True)
    ]
    paired = entries["gain", "gain"]["paired"]
    assert paired["mean"] == pytest.approx(statistics.fmean(b - a for a, b in zip(*gains, strict=True)))
    assert (paired["low"], paired["groups"]) == (None, 3)  # nine rows of three instructions
    scores = [[line["score"] for line in lines(folder / "bench_rows.jsonl")] for folder in folders]
    assert entries["bench", "score"]["paired"]["mean"] == pytest.approx(
        statistics.fmean(b - a for a, b in zip(*scores, strict=True))
    )
    wins = json.loads((folders[1] / "compare.json").read_text(encoding="utf-8"))["bench_by_rows"]["outcomes"]
    assert wins["win of the first"]["rows"] == sum(b > a for a, b in zip(*scores, strict=True)) > 0
    assert wins["both bad"]["rows"] == sum(a == b < 4 for a, b in zip(*scores, strict=True))
    assert f"| B wins | {wins['win of the first']['rows']} |" in shown
    # The table above states B minus A, and so does the sentence below the wins.
    change = entries["bench", "score"]["change"]
    assert change != 0
    assert f"B minus A: {change:+.2f}" in shown
    assert f"| bench: score | {'{:.3f}'.format(entries['bench', 'score']['a']['value'])}" in shown
    # A judge asked in other words grades otherwise; a file that names no version is of the first.
    record = json.loads((folders[1] / "bench.json").read_text(encoding="utf-8"))
    of_another = record["judge"] | {"prompt_version": 3}
    of_none = {name: value for name, value in record["judge"].items() if name != "prompt_version"}
    for judge, version in ((of_another, 3), (of_none, 1)):
        (folders[1] / "bench.json").write_text(json.dumps(record | {"judge": judge}), encoding="utf-8")
        shown = says_no("compare", *folders, "--only", "bench")
        assert f"bench: judge prompt_version is 2 and {version}" in shown


def test_gain_on_other_rows_is_refused_and_another_dtype_is_noted(
    command: Callable[..., int], says_no: Callable[..., str], tiny_chat_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A file of the same name and length may hold other rows: the texts must be the same, not the places."""
    rows = [
        {"system": f"Be {what}.", "prompt": f"q {row}", "output": f"{row} river"}
        for row in range(3)
        for what in ("a river", "a stone")
    ]

    def measured(name: str, output: str, *options: str) -> Path:
        (tmp_path / name).mkdir()
        data = tmp_path / name / "rows.jsonl"
        data.write_text("".join(json.dumps(row | {"output": row["output"] + output}) + "\n" for row in rows), "utf-8")
        arguments = ("--model", tiny_chat_model, "--data", data, "--json", tmp_path / name / "gain.json", *options)
        assert command("gain", *arguments) == 0
        return tmp_path / name

    first = measured("first", "")
    assert "gain: texts differ. " in says_no("compare", first, measured("other", " stone"))
    same = measured("same", "", "--dtype", "bfloat16")
    capsys.readouterr()
    assert command("compare", first, same) == 0
    shown = capsys.readouterr().out
    assert 'note: gain: dtype is "float32" and "bfloat16"' in shown
    entries = compared(same)["gain", "gain"]
    assert entries["rows"] == 6  # though they stand in another folder
    gains = [
        [line[tiny_chat_model.name]["gain"] for line in lines(entry / "gain_rows.jsonl")] for entry in (first, same)
    ]
    assert entries["paired"]["mean"] == pytest.approx(statistics.fmean(b - a for a, b in zip(*gains, strict=True)))
    record = json.loads((same / "gain.json").read_text(encoding="utf-8"))
    del record["fingerprint"]  # as it was written before there was one
    (same / "gain.json").write_text(json.dumps(record), encoding="utf-8")
    assert "gain: texts are recorded for one of the two" in says_no("compare", first, same)


RULES = """
class Rule:
    def check(self, question, answer):
        return len(answer) % 2 == 0
RULES = {"even": Rule()}
"""


@pytest.fixture
def measured_with_before(
    command: Callable[..., int], tiny_chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """Folders a and b; gain and rules of b were measured with --before a, by their names from the folder above."""
    data, rules = tmp_path / "rows.jsonl", tmp_path / "rules.py"
    rules.write_text(RULES, encoding="utf-8")
    turns = [[("system", f"Be {row}."), ("user", f"q {row // 2}"), ("assistant", f"{row} river")] for row in range(8)]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in row], "rule": "even", "held_out": "wording"}
        for row in turns
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in ("a", "b"):
        shutil.copytree(tiny_chat_model, tmp_path / name)
    weights = load_file(tmp_path / "b" / "model.safetensors")
    scaled = {name: value * 1.1 for name, value in weights.items()}
    save_file(scaled, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        assert command("gain", "--before", "a", "--model", "b", "--data", data) == 0
        asked = ("--rules", rules, "--data", data, "--max-new-tokens", "6")
        assert command("rules", "--before", "a", "--after", "b", *asked) == 0
    return tmp_path / "a", tmp_path / "b"


def test_results_measured_with_before_count_as_those_of_that_model(
    command: Callable[..., int], measured_with_before: tuple[Path, Path], tiny_chat_model: Path, tmp_path: Path,
    says_no: Callable[..., str],
) -> None:  # fmt: skip
    """The result does not depend on the working directory."""
    folders = measured_with_before
    assert command("compare", *folders) == 0
    entries = compared(folders[1])
    kept = lines(folders[1] / "gain_rows.jsonl")
    changes = [line["after"]["gain"] - line["before"]["gain"] for line in kept]
    assert entries["gain", "gain"]["paired"]["mean"] == pytest.approx(statistics.fmean(changes))
    obeys = [line["obeys"] for line in lines(folders[1] / "answers.jsonl")]
    assert entries["rules", "held-out wordings"]["a"]["value"] == sum(before for before, _ in obeys) / 8
    assert entries["rules", "held-out wordings"]["change"] == pytest.approx(sum(b - a for a, b in obeys) / 8)
    shutil.copytree(tiny_chat_model, tmp_path / "another")
    assert "has no results" in says_no("compare", tmp_path / "another", folders[1])


def test_another_model_before_training_is_named_in_the_error(
    command: Callable[..., int], measured_with_before: tuple[Path, Path], tmp_path: Path, says_no: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A relative name means another folder elsewhere; in a moved tree it means the folder that it names now."""
    before, after = measured_with_before
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(before, elsewhere / "a")
    monkeypatch.chdir(elsewhere)
    other = f"measured with --before {before}, and A is {elsewhere / 'a'}"
    assert f"B was {other}" in says_no("compare", "a", after)
    write_bench(elsewhere / "a", [1.0, 2.0])
    write_bench(after, [2.0, 2.0])
    capsys.readouterr()
    assert command("compare", "a", after) == 0
    shown = capsys.readouterr().out
    assert f"note: gain: only B has it: it was {other}" in shown
    assert f"note: rules: only B has it: it was {other}" in shown
    (after / "bench.json").unlink()
    assert f"gain: it was {other}" in says_no("compare", "a", after)
    shutil.rmtree(before)
    (elsewhere / "a" / "bench.json").unlink()
    assert command("compare", "a", after) == 0  # there is no other folder any more that it may have been
    assert ("gain", "gain") in compared(after)
    record = json.loads((after / "gain.json").read_text(encoding="utf-8"))
    for model in record["models"].values():
        del model["folder"]  # as it was written before there was one
    (after / "gain.json").write_text(json.dumps(record), encoding="utf-8")
    assert command("compare", "a", after, "--only", "gain") == 0
