r"""Rules obeyed: how often answers obey system messages whose rules a program can check, before and after training.

    python scripts/evaluate.py rules \
        --rules recipes/smollm2-135m/data/rules.py \
        --data recipes/smollm2-135m/data/held_out.jsonl \
        --before outputs/smollm2-135m-instruct \
        --after outputs/smollm2-135m-quickstart

Writes the answers to answers.jsonl, the figures to adherence.json and adherence.png, and a section into report.md, all
in the folder of the second model.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.cli import positive_int
from train.errors import UserError, replace_in_errors
from train.evaluation.folders import require_file, require_model
from train.evaluation.results import folder_of
from train.evaluation.results_dir import exclusive
from train.formatting import format_count
from train.reporting.markdown import replace_section, truncate_middle
from train.reporting.plots import error_bars, load_pyplot
from train.resampling import Estimate, estimate_share, explain_missing_intervals
from train.storage.atomic_write import atomic_write, write_text

HEADING = "## Does it follow system messages?"
ALL = "all rules"
KINDS = {"wording": "held-out questions and wordings", "rule": "rules never trained"}


@dataclass(frozen=True)
class RuleVerdict:
    """One held-out row: what both models answered, and whether each answer obeys."""

    row: dict[str, Any]
    answers: tuple[str, str]
    obeys: tuple[bool, bool]


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser(
        "rules", help="adherence to rules that a program can check, before and after", description=__doc__
    )
    parser.add_argument("--rules", type=Path, required=True, help="Python file that defines RULES")
    parser.add_argument("--data", type=Path, required=True, help="held-out rows, a JSONL file")
    parser.add_argument("--before", type=Path, required=True, help="folder of the model before training")
    parser.add_argument("--after", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--max-new-tokens", type=positive_int, default=96, help="most tokens of an answer (default 96)")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="answers at a time (default 16)")
    parser.set_defaults(run=run)


def read_rows(path: Path, rules: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of {messages, rule, held_out}. Raises UserError where there is none, or with the line of one at fault."""
    require_file("--data", path)
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut a text at U+2028
    except UnicodeDecodeError as fault:
        raise UserError(f"--data {path}: not UTF-8: {fault}. Give a jsonl file.") from fault
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(_row(line, rules))
            except ValueError as fault:
                raise UserError(f"--data {path}:{number}: {fault}") from fault
    if not rows:
        raise UserError(f"--data {path}: holds no rows. Give a jsonl file with messages, rule and held_out.")
    return rows


def _row(line: str, rules: Mapping[str, Any]) -> dict[str, Any]:
    """One row. Raises ValueError with what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as fault:
        raise ValueError(f"not valid JSON: {fault.msg} at column {fault.colno}.") from fault
    if not isinstance(row, dict):
        raise ValueError(f"found a {type(row).__name__}. Allowed: an object with messages, rule and held_out.")
    for key, allowed in ("rule", rules), ("held_out", KINDS):
        if key not in row:
            raise ValueError(f"`{key}` is missing. Allowed: {', '.join(allowed)}.")
        if not isinstance(row[key], str) or row[key] not in allowed:
            raise ValueError(f"`{key}` is {row[key]!r}. Allowed: {', '.join(allowed)}.")
    messages = row.get("messages")
    turns = messages if isinstance(messages, list) else []
    if [turn.get("role") for turn in turns if isinstance(turn, dict)] != ["system", "user", "assistant"] or not all(
        isinstance(turn.get("content"), str) for turn in turns
    ):
        raise ValueError("`messages` must be a system message, a user message and an answer, each with its text.")
    return row


def read_rules(path: Path) -> Mapping[str, Any]:
    """RULES of the Python file `path`, by name. Raises UserError where the file is not there, fails or has none."""
    require_file("--rules", path)
    spec = importlib.util.spec_from_file_location("rules", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--rules {path}: that is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as fault:  # whatever that file does
        raise UserError(f"--rules {path}: {type(fault).__name__}: {fault}") from fault
    rules = getattr(module, "RULES", None)
    if not isinstance(rules, Mapping) or not rules:
        raise UserError(f"--rules {path}: holds no RULES, a dictionary of names and rules with a `check`")
    for name, rule in rules.items():
        if not callable(getattr(rule, "check", None)):
            raise UserError(f"--rules {path}: RULES[{name!r}] has no `check`, a function of question and answer")
    return rules


def answer(folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """What the model in `folder`, whole or an adapter, answers to each row's system and user message."""
    from train.evaluation.models.responses import LocalModel, generate_answers
    from train.llm.client import RequestFailed
    from train.llm.journal import Decoding

    with replace_in_errors({"--model": "--before or --after"}):
        found = generate_answers(
            LocalModel(str(folder), dtype="bfloat16", batch_size=options.batch_size),
            [row["messages"][:-1] for row in rows],
            Decoding(options.max_new_tokens, temperature=0.0),
            options.after / "rules.sqlite",
            description=f"answers of {folder.name}",
        )
    texts = []
    for row, [given] in zip(rows, found, strict=True):
        if isinstance(given, RequestFailed):
            raise UserError(f"{folder}: no answer to {row['messages'][1]['content']!r}: {given}")
        texts.append(given.text)
    return texts


def adherence(verdicts: list[RuleVerdict]) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Kind of held-out row -> rule -> (rows, obeyed before, obeyed after)."""
    counts: dict[str, dict[str, tuple[int, int, int]]] = defaultdict(dict)
    for verdict in verdicts:
        of_rule = counts[verdict.row["held_out"]]
        rows, before, after = of_rule.get(verdict.row["rule"], (0, 0, 0))
        of_rule[verdict.row["rule"]] = (rows + 1, before + verdict.obeys[0], after + verdict.obeys[1])
    return dict(counts)


def total(of_rule: dict[str, tuple[int, int, int]]) -> tuple[int, int, int]:
    """Rows, obeyed before, obeyed after, over all rules."""
    rows, before, after = (sum(column) for column in zip(*of_rule.values(), strict=True))
    return rows, before, after


def intervals(verdicts: list[RuleVerdict]) -> dict[str, dict[str, tuple[Estimate, Estimate]]]:
    """Kind of held-out row -> rule, or ALL -> adherence before and after; answers to one question are one group."""
    found: dict[str, dict[str, tuple[Estimate, Estimate]]] = {}
    for kind, of_rule in adherence(verdicts).items():
        found[kind] = {}
        for rule in (ALL, *sorted(of_rule)):
            some = [one for one in verdicts if one.row["held_out"] == kind and rule in (ALL, one.row["rule"])]
            questions = [one.row["messages"][1]["content"] for one in some]
            before, after = (estimate_share([one.obeys[when] for one in some], questions) for when in (0, 1))
            found[kind][rule] = before, after
    return found


def section(verdicts: list[RuleVerdict], max_new_tokens: int) -> str:
    """The part of report.md, in Markdown: a table for each kind of held-out row, and five samples."""
    lines = [HEADING, ""]
    found = intervals(verdicts)
    for kind, of_rule in adherence(verdicts).items():
        rows, before, after = total(of_rule)
        lines += [
            f"**{KINDS[kind].capitalize()}: {before / rows:.1%} before, {after / rows:.1%} after** "
            f"({before} and {after} of {format_count(rows, 'answer')}, greedy, at most {max_new_tokens} tokens)",
            "",
            "| rule | rows | before | after |",
            "|---|---|---|---|",
            *(
                f"| {rule} | {rows if rule == ALL else of_rule[rule][0]} | {_percent(old)} | {_percent(new)} |"
                for rule, (old, new) in found[kind].items()
            ),
            "",
        ]
    lines += ["95 % intervals; answers to the same question are not taken for independent."]
    lines += [*explain_missing_intervals("\n".join(lines), "questions"), ""]
    lines += ["![adherence](adherence.png)", "", "Five answers side by side:", ""]
    for verdict in verdicts[:: max(len(verdicts) // 5, 1)][:5]:
        system, user = (message["content"] for message in verdict.row["messages"][:2])
        lines += [f"- system: {_quoted(system)}", f"  - user: {_quoted(user)}"]
        for when, text, obeys in zip(("before", "after"), verdict.answers, verdict.obeys, strict=True):
            lines.append(f"  - {when} ({'obeys' if obeys else 'does not obey'}): {_quoted(text)}")
    return "\n".join(lines) + "\n"


def _percent(share: Estimate) -> str:
    """`12.3 % [10.0, 14.5]`, or `50.0 % (n = 2)`."""
    shown = f"{100 * share.mean:.1f} %"
    if share.low is None or share.high is None:
        return f"{shown} ({share.missing})"
    return f"{shown} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _quoted(text: str) -> str:
    """`text` on one line of Markdown, as it is."""
    shown = text if len(text) <= 300 else text[:300] + " ..."
    return "`" + shown.replace("`", "'").replace("\n", " ⏎ ") + "`"


def draw(verdicts: list[RuleVerdict], path: Path) -> None:
    """Adherence before and after, a pair of bars a rule, as a PNG."""
    pyplot = load_pyplot()
    bars = [
        (f"{rule}{' (never trained)' if kind == 'rule' else ''}", found)
        for kind, of_rule in intervals(verdicts).items()
        for rule, found in of_rule.items()
    ]
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(bars) + 1.4), dpi=100, layout="constrained")
    places = range(len(bars))
    for when, name, colour in ((0, "before", "lightgray"), (1, "after", "tab:blue")):
        shares = [found[when] for _, found in bars]
        ends = error_bars((share.mean, share.low, share.high) for share in shares)
        at = [place + 0.4 * when - 0.2 for place in places]
        axes.barh(at, [share.mean for share in shares], 0.4, xerr=ends, label=name, color=colour, capsize=2)
    axes.set_yticks(list(places), [truncate_middle(name, 48) for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of held-out answers that obey the system message (95 %)")
    axes.margins(y=0.01)
    figure.suptitle("Adherence to system messages", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def run(options: argparse.Namespace) -> None:
    """Let both models answer, write the answers, the figures, the plot and the section of report.md."""
    known = read_rules(options.rules)
    rows = read_rows(options.data, known)
    for option, folder in (("--before", options.before), ("--after", options.after)):
        require_model(option, str(folder), hub=False)
    with exclusive(options.after, "rules"):
        _measure(options, known, rows)


def _measure(options: argparse.Namespace, known: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    answers = [answer(folder, rows, options) for folder in (options.before, options.after)]
    verdicts = []
    for row, *texts in zip(rows, *answers, strict=True):
        question = row["messages"][1]["content"]
        obeys = [known[row["rule"]].check(question, text) for text in texts]
        verdicts.append(RuleVerdict(row, (texts[0], texts[1]), (obeys[0], obeys[1])))

    try:
        write(verdicts, options)
    except OSError as fault:
        raise UserError(f"{options.after}: can't be written: {fault.strerror}") from fault


def write(verdicts: list[RuleVerdict], options: argparse.Namespace) -> None:
    """answers.jsonl, adherence.json and its plot, and the section of report.md, which is printed, too."""
    folder: Path = options.after
    checks = hashlib.blake2b(options.rules.read_bytes(), digest_size=16).hexdigest()
    asked = {
        "before": str(options.before),
        "before_folder": folder_of(options.before),
        "max_new_tokens": options.max_new_tokens,
        "rules": checks,
    }
    figures = {"asked": asked} | {
        kind: {rule: dict(zip(("rows", "before", "after"), counts, strict=True)) for rule, counts in of_rule.items()}
        for kind, of_rule in adherence(verdicts).items()
    }
    figures["intervals"] = {
        kind: {rule: {"before": old.record(), "after": new.record()} for rule, (old, new) in of_rule.items()}
        for kind, of_rule in intervals(verdicts).items()
    }
    records = ({**verdict.row, "answers": verdict.answers, "obeys": verdict.obeys} for verdict in verdicts)
    names = ("answers.jsonl", "adherence.json", "adherence.png")
    with atomic_write(*(folder / name for name in names)) as [lines, figures_file, plot]:
        write_text(lines, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        write_text(figures_file, json.dumps(figures, indent=2) + "\n")
        draw(verdicts, plot)
    report = folder / "report.md"
    text = section(verdicts, options.max_new_tokens)
    replace_section(report, HEADING, text)
    print(text)
    print(f"all of it is in {report}")
