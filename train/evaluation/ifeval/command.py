r"""S-IFEval: the share of checkable constraints in the system message that answers follow.

    python scripts/evaluate.py ifeval --model outputs/smollm2-135m-quickstart \
        --data recipes/smollm2-135m/data/system_ifeval.jsonl \
        --control recipes/smollm2-135m/data/system_ifeval_user.jsonl

--control measures the same constraints in the user turn. lm-evaluation-harness's own checkers decide. Writes
ifeval.json, ifeval_answers.jsonl, ifeval.png and a section of report.md. Answers are kept in ifeval.sqlite, so the same
command continues a run that was stopped.
"""

import argparse
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from train.errors import UserError
from train.evaluation.answer_endings import NO_ANSWER, describe_ending, summarize_unanswered
from train.evaluation.answer_options import AnswerOptions
from train.evaluation.command_options import add_options, load_settings
from train.evaluation.ifeval.metrics import gaps, gaps_by_rule, shares, shares_by_rule
from train.evaluation.ifeval.report import HEADING, CheckedAnswer, plot_shares, section
from train.evaluation.required_paths import require_file
from train.evaluation.results_dir import Writer, as_json, exclusive, fingerprint_of, write_results
from train.ifeval.checkers import Checkers
from train.ifeval.rows import (
    PLACES,
    SKIPPED,
    IFEvalRow,
    match_rows,
    place_of_constraints,
    read_rows,
    refuse_swapped_control,
)
from train.llm.refusals import option_formatter
from train.llm.request import Answer
from train.llm.system_role import merge_into_user
from train.recipe import PathText

Asked = dict[str, list[IFEvalRow]]
"""Turn that holds the constraints ("system", "user") -> the rows that are asked there."""


class IFEvalOptions(AnswerOptions):
    """One run of IFEval: the model, the rows and the results."""

    data: PathText
    """S-IFEval's rows, or IFEval's, as jsonl."""
    control: PathText | None = None
    """The same rows with the constraints in the user turn."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows, from the first (default all)."""
    all_rules: bool = False
    """Also score prompts with language:response_language or combination:repeat_prompt, which the official scoring
    skips."""
    max_new_tokens: int = Field(default=1280, ge=1)
    """Maximum tokens of an answer; the default is the official one."""
    temperature: float | None = Field(default=0.0, ge=0)
    """Sampling temperature; 0 = greedy, the official one; null = not sent, so the server's own."""


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser(
        "ifeval", help="S-IFEval: checkable constraints in the system message", description=__doc__
    )
    add_options(parser, IFEvalOptions)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Ask, check, and write answers, figures, plot and report. Raises UserError."""
    config = load_settings(options, IFEvalOptions)
    config.refuse_extra()
    require_file("--data", config.data)
    if config.control:
        require_file("--control", config.control)
    folder = config.results_folder()
    with exclusive(folder, "ifeval"):
        _measure(config, folder)


def _measure(config: IFEvalOptions, folder: Path) -> None:
    rows, by_turn, places = _read_turns(config)
    checkers = Checkers()
    randomized = {row.key for row in rows if checkers.is_randomized(row)}
    skipped = Counter(rule for row in rows if row.skipped and not config.all_rules for rule in row.instructions)
    scored = [number for number, row in enumerate(rows) if config.all_rules or not row.skipped][: config.limit]
    if not scored:
        raise UserError(
            f"--data {config.data}: every row has a rule that is skipped ({', '.join(SKIPPED)}). Score them with "
            "--all-rules."
        )
    asked = {turn: [of_turn[number] for number in scored] for turn, of_turn in by_turn.items()}
    answers = ask(config, asked, checkers, folder / "ifeval.sqlite")
    for turn, of_turn in answers.items():
        if all(answer.why for answer in of_turn):
            raise UserError(
                f"--model {config.model}: none of the {len(of_turn):,} prompts with constraints {places[turn]} got an "
                f"answer. Reason of the first: {str(of_turn[0].why).rstrip('.')}. {of_turn[0].advice}".rstrip()
            )
    decoding = config.decoding()
    record: dict[str, Any] = {
        "kind": "ifeval",
        "model": config.model,
        "model_files": config.model_files(),
        "data": {
            "file": str(config.data),
            "control": str(config.control) if config.control else None,
            "rows": len(rows),
            "left_out": {rule: skipped[rule] for rule in SKIPPED if skipped[rule]},
            "prompts": len(scored),
            "constraints": sum(len(rows[number].instructions) for number in scored),
            "fingerprint": fingerprint(asked),
            "same_in_both_turns": count_equal_prompts(config, asked),
            "drawn_at_random": [key for key in (rows[number].key for number in scored) if key in randomized],
        },
        "decoding": {
            "max_new_tokens": decoding.max_tokens if decoding.limit_name else None,
            "temperature": decoding.temperature,
            **decoding.extra,
        },
        "respondent": {name: getattr(config, name) for name in ("template", "system_role", "engine", "dtype")},
        "checkers": checkers.record(),
        "seed": config.seed,
    }
    verdicts = {turn: [answer.verdict for answer in of_turn] for turn, of_turn in answers.items()}
    by_rule = {turn: shares_by_rule(asked[turn], verdicts[turn], config.seed) for turn in asked}
    overall = {turn: shares(asked[turn], verdicts[turn], config.seed) for turn in asked}
    for turn, of_turn in answers.items():
        record[turn] = {
            **{name: share.record() for name, share in overall[turn].items()},
            "by_rule": {
                rule: {manner: share.record() for manner, share in of_rule.items()}
                for rule, of_rule in by_rule[turn].items()
            },
            "endings": dict(Counter(answer.how for answer in of_turn)),
        }
    gap = None
    if config.control:
        gap = gaps(asked["system"], verdicts["system"], verdicts["user"], config.seed)
        gap_by_rule = gaps_by_rule(asked["system"], verdicts["system"], verdicts["user"], config.seed)
        record["gap"] = {name: estimate.record() for name, estimate in gap.items()}
        record["gap"]["by_rule"] = {rule: estimate.record() for rule, estimate in gap_by_rule.items()}
    failures = [
        (f"key {row.key}, {places[turn]}", answer.why)
        for turn, rows_of_turn in asked.items()
        for row, answer in zip(rows_of_turn, answers[turn], strict=True)
        if answer.why
    ]
    unanswered = summarize_unanswered("prompt", "count as following nothing", failures)
    text = section(record, places, overall, by_rule, gap, unanswered)
    files: dict[str, Writer] = {
        "ifeval_answers.jsonl": partial(write_answers, asked=asked, answers=answers),
        "ifeval.json": as_json(record),
        "ifeval.png": partial(plot_shares, places, overall, by_rule),
    }
    write_results(folder, files, heading=HEADING, section=text)
    print(text)
    print(f"figures: {folder / 'ifeval.json'}; answers: {folder / 'ifeval_answers.jsonl'}")
    if unanswered:
        print(f"warning: {unanswered.rstrip('.')}. The same command requests only these again.")


def _read_turns(config: IFEvalOptions) -> tuple[list[IFEvalRow], Asked, dict[str, str]]:
    """Return the rows of --data, the rows of each turn, and the place of each turn's constraints in words."""
    path = Path(config.data)
    rows = read_rows(path)
    if config.control:
        control = match_rows(rows, read_rows(Path(config.control)), Path(config.control))
        refuse_swapped_control(rows, control)
        return rows, {"system": rows, "user": control}, PLACES
    turn, place = place_of_constraints(rows, path)
    return rows, {turn: rows}, {turn: place}


def ask(config: IFEvalOptions, asked: Asked, checkers: Checkers, journal: Path) -> dict[str, list[CheckedAnswer]]:
    """Return answers and verdicts for each turn. Answers in the journal are not requested again."""
    from train.evaluation.models.responses import generate_answers

    answers = iter(
        generate_answers(
            config.local_or_served(),
            [list(row.messages) for rows in asked.values() for row in rows],
            config.decoding(),
            journal,
            stage="ifeval",
            description="answers",
            wait_for_server=config.wait_for_server,
            format_setting=option_formatter(("temperature",)),
        )
    )
    return {turn: [_checked(next(answers)[0], row, checkers) for row in rows] for turn, rows in asked.items()}


def _checked(answer: Any, row: IFEvalRow, checkers: Checkers) -> CheckedAnswer:
    if not isinstance(answer, Answer):
        reason = str(answer) or type(answer).__name__
        return CheckedAnswer(None, NO_ANSWER, checkers.verdict(row, ""), reason, answer.advice)
    return CheckedAnswer(answer.text, describe_ending(answer), checkers.verdict(row, answer.text))


def count_equal_prompts(config: IFEvalOptions, asked: Asked) -> int:
    """Return the number of prompts that --system-role merge_into_user makes equal to those of the control."""
    if config.system_role != "merge_into_user" or len(asked) < 2:
        return 0
    pairs = zip(asked["system"], asked["user"], strict=True)
    return sum(merge_into_user(row.messages) == merge_into_user(control.messages) for row, control in pairs)


def fingerprint(asked: Asked) -> str:
    """Return a checksum of prompts and constraints, by which `compare` checks that two runs asked the same."""
    contents = [
        [turn, [[row.key, row.prompt, row.instructions, row.arguments, row.messages] for row in rows]]
        for turn, rows in asked.items()
    ]
    return fingerprint_of(contents)


def write_answers(path: Path, asked: Asked, answers: dict[str, list[CheckedAnswer]]) -> None:
    """Write one line for each answer: turn, key, rules, the answer that was checked, the verdicts for each rule."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
        for turn, rows in asked.items():
            for row, answer in zip(rows, answers[turn], strict=True):
                record = {
                    "turn": turn,
                    "key": row.key,
                    "instruction_id_list": row.instructions,
                    "answer": answer.text,
                    "how": answer.how,
                    "why": answer.why,
                    "strict": answer.verdict.strict,
                    "loose": answer.verdict.loose,
                }
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
