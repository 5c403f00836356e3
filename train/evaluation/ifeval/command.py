r"""Constraints of the system message that answers follow, by lm-evaluation-harness's own checkers.

    python scripts/evaluate.py ifeval --model outputs/smollm2-135m-quickstart \
        --data recipes/smollm2-135m/data/system_ifeval.jsonl \
        --control recipes/smollm2-135m/data/system_ifeval_user.jsonl

--control measures the same constraints in the user turn. Writes ifeval.json, ifeval_answers.jsonl, ifeval.png and a
section into report.md. Answers are kept in ifeval.sqlite, so the same command continues a run that was stopped.
"""

import argparse
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.cli import float_or_null, non_negative_int, positive_int
from train.errors import UserError
from train.evaluation.folders import require_file, require_model, require_results_folder
from train.evaluation.ifeval.checkers import Checkers
from train.evaluation.ifeval.metrics import gaps, gaps_by_rule, shares, shares_by_rule
from train.evaluation.ifeval.report import HEADING, CheckedAnswer, about_unanswered, draw, section
from train.evaluation.ifeval.rows import (
    PLACES,
    SKIPPED,
    IFEvalRow,
    place_of_constraints,
    read_rows,
    refuse_other_turns,
    same_rows,
)
from train.evaluation.models.options import add_respondent, refuse_extra_fields, respondent_of
from train.evaluation.results_dir import exclusive
from train.llm.journal import Answer, Decoding
from train.llm.refusals import option_formatter
from train.llm.system_role import merge_into_user
from train.reporting.markdown import replace_section
from train.storage.atomic_write import atomic_write, write_text

if TYPE_CHECKING:
    pass


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser(
        "ifeval", help="S-IFEval: checkable constraints in the system message", description=__doc__
    )
    add_respondent(parser)
    parser.add_argument("--data", type=Path, required=True, help="S-IFEval's rows, or IFEval's, as jsonl")
    parser.add_argument("--control", type=Path, help="the same rows with the constraints in the user turn")
    parser.add_argument("--limit", type=positive_int, help="number of rows, from the first (default all)")
    parser.add_argument(
        "--all-rules",
        action="store_true",
        help=f"score also prompts with {' or '.join(SKIPPED)}, which the official scoring leaves out",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=1280, help="longest answer (default 1280, the official one)"
    )
    parser.add_argument(
        "--temperature",
        type=_from_zero,
        default=0.0,
        help="of the answers (default 0, the official one); null = not sent, so the server's own",
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, help="of the intervals, and of answers drawn (default 0)"
    )
    parser.add_argument("--output-dir", type=Path, help="where everything goes (default the folder of --model)")
    parser.set_defaults(run=run)


def _from_zero(text: str) -> float | None:
    try:
        number = float_or_null(text)
    except argparse.ArgumentTypeError:
        number = math.nan
    if number is not None and not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 up, nor null")
    return number


def run(options: argparse.Namespace) -> None:
    """Ask, check, and write answers, figures, plot and report. Raises UserError."""
    own = {
        "max_tokens": ("--max-new-tokens", options.max_new_tokens),
        "temperature": ("--temperature", options.temperature),
        "seed": ("--seed", options.seed if options.temperature else None),
    }
    refuse_extra_fields("--extra", options.extra, own)
    folder = output_folder(options)
    with exclusive(folder, "ifeval"):
        _measure(options, folder)


def _measure(options: argparse.Namespace, folder: Path) -> None:
    rows = read_rows(options.data)
    control = same_rows(rows, read_rows(options.control), options.control) if options.control else None
    if control:
        refuse_other_turns(rows, control)
        places, by_turn = PLACES, {"system": rows, "user": control}
    else:
        turn, words = place_of_constraints(rows, options.data)
        places, by_turn = {turn: words}, {turn: rows}
    checkers = Checkers()
    at_random = {row.key for row in rows if checkers.drawn_at_random(row)}
    left_out = Counter(rule for row in rows if row.skipped and not options.all_rules for rule in row.instructions)
    scored = [number for number, row in enumerate(rows) if options.all_rules or not row.skipped][: options.limit]
    if not scored:
        raise UserError(f"--data {options.data}: every row has a rule that is left out ({', '.join(SKIPPED)}); "
                        "score them with --all-rules")  # fmt: skip
    asked = {turn: [of_turn[number] for number in scored] for turn, of_turn in by_turn.items()}

    found = ask(options, asked, checkers, folder / "ifeval.sqlite")
    for turn, answers in found.items():
        if all(one.why for one in answers):
            raise UserError(
                f"--model {options.model}: none of the {len(answers):,} prompts with constraints {places[turn]} got an "
                f"answer. Of the first: {str(answers[0].why).rstrip('.')}. {answers[0].advice}".rstrip()
            )
    verdicts = {turn: [one.verdict for one in answers] for turn, answers in found.items()}
    decoding = decoding_of(options)
    record: dict[str, Any] = {
        "kind": "ifeval",
        "model": options.model,
        "data": {
            "file": str(options.data),
            "control": str(options.control) if options.control else None,
            "rows": len(rows),
            "left_out": {rule: left_out[rule] for rule in SKIPPED if left_out[rule]},
            "prompts": len(scored),
            "constraints": sum(len(rows[number].instructions) for number in scored),
            "fingerprint": fingerprint(asked),
            "same_in_both_turns": same_when_merged(options, asked),
            "drawn_at_random": [key for key in (rows[number].key for number in scored) if key in at_random],
        },
        "decoding": {
            "max_new_tokens": decoding.max_tokens if decoding.limit_name else None,
            "temperature": decoding.temperature,
            **decoding.extra,
        },
        "respondent": {name: getattr(options, name) for name in ("template", "system_role", "engine", "dtype")},
        "checkers": checkers.record(),
        "seed": options.seed,
    }
    of_rule = {turn: shares_by_rule(asked[turn], verdicts[turn], options.seed) for turn in asked}
    overall = {turn: shares(asked[turn], verdicts[turn], options.seed) for turn in asked}
    for turn, answers in found.items():
        record[turn] = {
            **{name: share.record() for name, share in overall[turn].items()},
            "by_rule": {
                rule: {manner: share.record() for manner, share in one.items()} for rule, one in of_rule[turn].items()
            },
            "endings": dict(Counter(one.how for one in answers)),
        }
    gap = None
    if control:
        gap = gaps(asked["system"], verdicts["system"], verdicts["user"], options.seed)
        by_rule = gaps_by_rule(asked["system"], verdicts["system"], verdicts["user"], options.seed)
        record["gap"] = {name: one.record() for name, one in gap.items()}
        record["gap"]["by_rule"] = {rule: one.record() for rule, one in by_rule.items()}
    unanswered = about_unanswered(asked, found, places)
    text = section(record, places, overall, of_rule, gap, unanswered)
    try:
        names = ("ifeval_answers.jsonl", "ifeval.json", "ifeval.png")
        with atomic_write(*(folder / name for name in names)) as [lines, figures, plot]:
            write_answers(lines, asked, found)
            write_text(figures, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            draw(places, overall, of_rule, plot)
        replace_section(folder / "report.md", HEADING, text)
    except OSError as fault:
        raise UserError(f"{folder}: can't be written: {fault.strerror}") from fault
    print(text)
    print(f"the figures are in {folder / 'ifeval.json'}, the answers in {folder / 'ifeval_answers.jsonl'}")
    if unanswered:
        print(f"warning: {unanswered.rstrip('.')}. The same command asks again for these alone.")


def output_folder(options: argparse.Namespace) -> Path:
    """--output-dir, made where it isn't there, or the folder of the model.

    Raises UserError, also for a model or a file that isn't there.
    """
    require_file("--data", options.data)
    if options.control:
        require_file("--control", options.control)
    if options.output_dir is None:
        require_results_folder("--model", options.model, "For a hub id or a server, say --output-dir FOLDER as well.")
    if not options.server:
        require_model("--model", options.model)
    folder: Path = options.output_dir or Path(options.model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(f"--output-dir {folder}: can't be made: {fault.strerror}") from fault
    return folder


def ask(
    options: argparse.Namespace, asked: dict[str, list[IFEvalRow]], checkers: Checkers, journal: Path
) -> dict[str, list[CheckedAnswer]]:
    """Answers and verdicts for each turn. What the journal holds is not asked again."""
    from train.evaluation.models.responses import generate_answers

    conversations = [list(row.messages) for rows in asked.values() for row in rows]
    respondent = respondent_of(options)
    answers = iter(
        generate_answers(
            respondent,
            conversations,
            decoding_of(options),
            journal,
            stage="ifeval",
            description="answers",
            wait_for_server=options.wait_for_server,
            format_setting=option_formatter(("temperature",)),
        )
    )
    return {turn: [_answered(next(answers)[0], row, checkers) for row in rows] for turn, rows in asked.items()}


def decoding_of(options: argparse.Namespace) -> Decoding:
    """Return how answers are drawn."""
    return Decoding.from_settings(
        max_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed if options.temperature else None,
        extra=options.extra,
    )


def _answered(answer: Any, row: IFEvalRow, checkers: Checkers) -> CheckedAnswer:
    if not isinstance(answer, Answer):
        words = str(answer) or type(answer).__name__
        return CheckedAnswer(None, "no answer", checkers.verdict(row, ""), words, answer.advice)
    how = answer.unfinished or "ended"
    if answer.cut:
        how = "without an end to its reasoning" if answer.only_reasoning else "cut"
    elif answer.ending == "unstated" and not answer.refused and not answer.text.strip():
        how = "empty"
    return CheckedAnswer(answer.text, how, checkers.verdict(row, answer.text))


def same_when_merged(options: argparse.Namespace, asked: dict[str, list[IFEvalRow]]) -> int:
    """Of how many prompts --system-role merge_into_user makes the very one of the control."""
    if options.system_role != "merge_into_user" or len(asked) < 2:
        return 0
    pairs = zip(asked["system"], asked["user"], strict=True)
    return sum(merge_into_user(row.messages) == merge_into_user(other.messages) for row, other in pairs)


def fingerprint(asked: dict[str, list[IFEvalRow]]) -> str:
    """A checksum of what was asked and of its constraints, by which `compare` knows that two runs asked the same."""
    told = [
        [turn, [[row.key, row.prompt, row.instructions, row.arguments, row.messages] for row in rows]]
        for turn, rows in asked.items()
    ]
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_answers(path: Path, asked: dict[str, list[IFEvalRow]], found: dict[str, list[CheckedAnswer]]) -> None:
    """One line for each answer: turn, key, rules, the answer that was checked, the verdicts for each rule."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
        for turn, rows in asked.items():
            for row, one in zip(rows, found[turn], strict=True):
                record = {
                    "turn": turn,
                    "key": row.key,
                    "instruction_id_list": row.instructions,
                    "answer": one.text,
                    "how": one.how,
                    "why": one.why,
                    "strict": one.verdict.strict,
                    "loose": one.verdict.loose,
                }
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
