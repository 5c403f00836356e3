r"""Rule adherence: how often answers obey system messages whose rules a program can check, before and after training.

    python scripts/evaluate.py rules \
        --data recipes/smollm2-135m/data/held_out.jsonl \
        --before outputs/smollm2-135m-instruct \
        --after outputs/smollm2-135m-quickstart

Writes the answers to answers.jsonl, the figures to adherence.json and adherence.png, and a section of report.md, all
in the folder of the second model.
"""

import argparse
import hashlib
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import train.pressure.rules
from train.cli import positive_int
from train.errors import UserError, replace_in_errors
from train.evaluation.formatting import format_share
from train.evaluation.required_paths import require_file, require_model
from train.evaluation.results import folder_of
from train.evaluation.results_dir import Writer, as_json, as_jsonl, exclusive, write_results
from train.formatting import format_count
from train.pressure.rule_rows import read_rule_rows
from train.reporting.markdown import quote_line, truncate_middle
from train.reporting.plots import BASELINE_COLOR, COLOR, BarSeries, bar_plot
from train.resampling import Estimate, estimate_share, explain_missing_intervals

HEADING = "## Does it follow system messages?"
ALL = "all rules"
RULES_FILE = Path(train.pressure.rules.__file__)
KINDS = {"wording": "held-out questions and wordings", "rule": "rules never trained"}


@dataclass(frozen=True)
class RuleVerdict:
    """A held-out row with the answers of both models, before and after, and whether each obeys the rule."""

    row: dict[str, Any]
    answers: tuple[str, str]
    obeys: tuple[bool, bool]


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser(
        "rules", help="adherence to rules that a program can check, before and after", description=__doc__
    )
    parser.add_argument(
        "--rules",
        type=Path,
        default=RULES_FILE,
        help="Python file that defines RULES (default: our own)",
    )
    parser.add_argument("--data", type=Path, required=True, help="held-out rows, a JSONL file")
    parser.add_argument("--before", type=Path, required=True, help="folder of the model before training")
    parser.add_argument("--after", type=Path, required=True, help="folder of the trained model")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=96, help="maximum tokens of an answer (default 96)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=16, help="answers at a time (default 16)")
    parser.set_defaults(run=run)


def read_rules(path: Path) -> Mapping[str, Any]:
    """Return RULES of the Python file `path`, by name. Raises UserError if the file is missing, fails or has none."""
    require_file("--rules", path)
    spec = importlib.util.spec_from_file_location("rules", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--rules {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's own code
        raise UserError(f"--rules {path}: {type(error).__name__}: {error}") from error
    rules = getattr(module, "RULES", None)
    if not isinstance(rules, Mapping) or not rules:
        raise UserError(f"--rules {path}: holds no RULES, a dictionary of names and rules with a `check`")
    for name, rule in rules.items():
        if not callable(getattr(rule, "check", None)):
            raise UserError(f"--rules {path}: RULES[{name!r}] has no `check`, a function of question and answer")
    return rules


def generate(folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Return the greedy answers of the model in `folder` to the system and user message of each row."""
    from train.evaluation.models.options import LocalModel
    from train.evaluation.models.responses import generate_answers
    from train.llm.failures import RequestFailed
    from train.llm.request import Decoding

    no_options = {"--system-role native: ": "chat.system_role: native: "}  # the model's own template has to do
    with replace_in_errors({"--model": "--before or --after"} | no_options):
        answers = generate_answers(
            LocalModel(str(folder), dtype="bfloat16", batch_size=options.batch_size),
            [row["messages"][:-1] for row in rows],
            Decoding(options.max_new_tokens, temperature=0.0),
            options.after / "rules.sqlite",
            description=f"answers of {folder.name}",
        )
    texts = []
    for row, [answer] in zip(rows, answers, strict=True):
        if isinstance(answer, RequestFailed):
            raise UserError(f"{folder}: no answer to {row['messages'][1]['content']!r}: {answer}")
        texts.append(answer.text)
    return texts


def count_adherence(verdicts: list[RuleVerdict]) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Return kind of held-out row -> rule -> (rows, obeyed before, obeyed after)."""
    counts: dict[str, dict[str, tuple[int, int, int]]] = defaultdict(dict)
    for verdict in verdicts:
        of_rule = counts[verdict.row["held_out"]]
        rows, before, after = of_rule.get(verdict.row["rule"], (0, 0, 0))
        of_rule[verdict.row["rule"]] = (rows + 1, before + verdict.obeys[0], after + verdict.obeys[1])
    return dict(counts)


def total(of_rule: dict[str, tuple[int, int, int]]) -> tuple[int, int, int]:
    """Sum rows, obeyed before and obeyed after over all rules."""
    rows, before, after = (sum(column) for column in zip(*of_rule.values(), strict=True))
    return rows, before, after


def intervals(verdicts: list[RuleVerdict]) -> dict[str, dict[str, tuple[Estimate, Estimate]]]:
    """Return kind of held-out row -> rule or ALL -> adherence before and after.

    Answers to the same question are one group of the bootstrap.
    """
    by_kind: dict[str, dict[str, tuple[Estimate, Estimate]]] = {}
    for kind, of_rule in count_adherence(verdicts).items():
        by_kind[kind] = {}
        for rule in (ALL, *sorted(of_rule)):
            selected = [
                verdict
                for verdict in verdicts
                if verdict.row["held_out"] == kind and rule in (ALL, verdict.row["rule"])
            ]
            questions = [verdict.row["messages"][1]["content"] for verdict in selected]
            before, after = (
                estimate_share([verdict.obeys[side] for verdict in selected], questions) for side in (0, 1)
            )
            by_kind[kind][rule] = before, after
    return by_kind


def section(verdicts: list[RuleVerdict], max_new_tokens: int) -> str:
    """Return the section of report.md: a table for each kind of held-out row, and five samples."""
    lines = [HEADING, ""]
    estimates = intervals(verdicts)
    for kind, of_rule in count_adherence(verdicts).items():
        rows, before, after = total(of_rule)
        lines += [
            f"**{KINDS[kind].capitalize()}: {before / rows:.1%} before, {after / rows:.1%} after** "
            f"({before} and {after} of {format_count(rows, 'answer')}, greedy, at most {max_new_tokens} tokens)",
            "",
            "| rule | rows | before | after |",
            "|---|---|---|---|",
            *(
                f"| {rule} | {rows if rule == ALL else of_rule[rule][0]} | {format_share(old)} | {format_share(new)} |"
                for rule, (old, new) in estimates[kind].items()
            ),
            "",
        ]
    lines += ["95 % intervals; answers to the same question are not treated as independent."]
    lines += [*explain_missing_intervals("\n".join(lines), "questions"), ""]
    lines += ["![adherence](adherence.png)", "", "Five answers side by side:", ""]
    for verdict in verdicts[:: max(len(verdicts) // 5, 1)][:5]:
        system, user = (message["content"] for message in verdict.row["messages"][:2])
        lines += [f"- system: {quote_line(system)}", f"  - user: {quote_line(user)}"]
        for side, text, obeys in zip(("before", "after"), verdict.answers, verdict.obeys, strict=True):
            lines.append(f"  - {side} ({'obeys' if obeys else 'does not obey'}): {quote_line(text)}")
    return "\n".join(lines) + "\n"


def plot_adherence(verdicts: list[RuleVerdict], path: Path) -> None:
    """Save a PNG of the adherence before and after, a pair of bars for each rule."""
    bars = [
        (truncate_middle(f"{rule}{' (never trained)' if kind == 'rule' else ''}", 48), pair)
        for kind, of_rule in intervals(verdicts).items()
        for rule, pair in of_rule.items()
    ]
    series = [
        BarSeries([(pair[side].mean, pair[side].low, pair[side].high) for _, pair in bars], label, color)
        for side, label, color in ((0, "before", BASELINE_COLOR), (1, "after", COLOR))
    ]
    xlabel = "share of held-out answers that obey the system message (95 %)"
    with bar_plot(path, "Adherence to system messages", xlabel, [name for name, _ in bars], series) as axes:
        axes.set_xlim(0, 1)


def run(options: argparse.Namespace) -> None:
    """Let both models answer; write the answers, the figures, the plot and the section of report.md."""
    rules = read_rules(options.rules)
    require_file("--data", options.data)
    rows = [row for _, row in read_rule_rows(options.data, rules, "--data ")]
    for option, folder in (("--before", options.before), ("--after", options.after)):
        require_model(option, str(folder), hub=False)
    with exclusive(options.after, "rules"):
        answers = [generate(folder, rows, options) for folder in (options.before, options.after)]
        verdicts = []
        for row, before, after in zip(rows, *answers, strict=True):
            check, question = rules[row["rule"]].check, row["messages"][1]["content"]
            obeys = check(question, before), check(question, after)
            verdicts.append(RuleVerdict(row, (before, after), obeys))
        write(verdicts, options)


def write(verdicts: list[RuleVerdict], options: argparse.Namespace) -> None:
    """Write answers.jsonl, adherence.json, its plot and the section of report.md, and print the section."""
    folder: Path = options.after
    settings = {
        "before": str(options.before),
        "before_folder": folder_of(options.before),
        "max_new_tokens": options.max_new_tokens,
        "rules": hashlib.blake2b(options.rules.read_bytes(), digest_size=16).hexdigest(),
    }
    record: dict[str, Any] = {"asked": settings} | {
        kind: {rule: dict(zip(("rows", "before", "after"), counts, strict=True)) for rule, counts in of_rule.items()}
        for kind, of_rule in count_adherence(verdicts).items()
    }
    record["intervals"] = {
        kind: {rule: {"before": old.record(), "after": new.record()} for rule, (old, new) in of_rule.items()}
        for kind, of_rule in intervals(verdicts).items()
    }
    answers = ({**verdict.row, "answers": verdict.answers, "obeys": verdict.obeys} for verdict in verdicts)
    text = section(verdicts, options.max_new_tokens)
    files: dict[str, Writer] = {
        "answers.jsonl": as_jsonl(answers),
        "adherence.json": as_json(record),
        "adherence.png": partial(plot_adherence, verdicts),
    }
    write_results(folder, files, heading=HEADING, section=text)
    print(text)
    print(f"report: {folder / 'report.md'}")
