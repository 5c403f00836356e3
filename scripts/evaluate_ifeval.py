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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report_section import put_section

from train.errors import UserError, not_negative, number_or_null, positive
from train.evaluation.folders import require_file, require_model, require_results_folder
from train.evaluation.ifeval import (
    PLACES,
    SKIPPED,
    Checkers,
    Row,
    Verdict,
    place_of_constraints,
    read_rows,
    refuse_other_turns,
    same_rows,
)
from train.evaluation.ifeval_figures import MEASURES, Share, gaps, gaps_by_rule, shares, shares_by_rule
from train.evaluation.one_at_a_time import alone_in
from train.evaluation.respondent import add_respondent, refuse_in_extra, respondent_of
from train.llm.journal import Answer, Decoding
from train.llm.refusals import option_setting
from train.llm.system_role import merge_into_user
from train.progress import counted
from train.report_parts import error_bars, load_pyplot
from train.resampling import explain_missing
from train.whole_files import replacing, write_text

if TYPE_CHECKING:
    from train.resampling import Estimate

HEADING = "## Constraints that a program can check"


@dataclass(frozen=True)
class Answered:
    """What came back for one row; `text` without reasoning, None where there was no answer, and `how` it ended.

    `why`: the reason where there was no answer; `advice`: the option to change, where the server's error is about one.
    """

    text: str | None
    how: str
    verdict: Verdict
    why: str | None = None
    advice: str = ""


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser(
        "ifeval", help="S-IFEval: checkable constraints in the system message", description=__doc__
    )
    add_respondent(parser)
    parser.add_argument("--data", type=Path, required=True, help="S-IFEval's rows, or IFEval's, as jsonl")
    parser.add_argument("--control", type=Path, help="the same rows with the constraints in the user turn")
    parser.add_argument("--limit", type=positive, help="number of rows, from the first (default all)")
    parser.add_argument(
        "--all-rules",
        action="store_true",
        help=f"score also prompts with {' or '.join(SKIPPED)}, which the official scoring leaves out",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=1280, help="longest answer (default 1280, the official one)"
    )
    parser.add_argument(
        "--temperature",
        type=_from_zero,
        default=0.0,
        help="of the answers (default 0, the official one); null = not sent, so the server's own",
    )
    parser.add_argument(
        "--seed", type=not_negative, default=0, help="of the intervals, and of answers drawn (default 0)"
    )
    parser.add_argument("--output-dir", type=Path, help="where everything goes (default the folder of --model)")
    parser.set_defaults(run=run)


def _from_zero(text: str) -> float | None:
    try:
        number = number_or_null(text)
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
    refuse_in_extra("--extra", options.extra, own)
    folder = output_folder(options)
    with alone_in(folder, "ifeval"):
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
        with replacing(*(folder / name for name in names)) as [lines, figures, plot]:
            write_answers(lines, asked, found)
            write_text(figures, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            draw(places, overall, of_rule, plot)
        put_section(folder / "report.md", HEADING, text)
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
    options: argparse.Namespace, asked: dict[str, list[Row]], checkers: Checkers, journal: Path
) -> dict[str, list[Answered]]:
    """Answers and verdicts for each turn. What the journal holds is not asked again."""
    from train.evaluation.responses import respond

    conversations = [list(row.messages) for rows in asked.values() for row in rows]
    respondent = respondent_of(options)
    answers = iter(
        respond(
            respondent,
            conversations,
            decoding_of(options),
            journal,
            stage="ifeval",
            description="answers",
            wait_for_server=options.wait_for_server,
            name_setting=option_setting(("temperature",)),
        )
    )
    return {turn: [_answered(next(answers)[0], row, checkers) for row in rows] for turn, rows in asked.items()}


def decoding_of(options: argparse.Namespace) -> Decoding:
    """Return how answers are drawn."""
    return Decoding.of_settings(
        max_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed if options.temperature else None,
        extra=options.extra,
    )


def _answered(answer: Any, row: Row, checkers: Checkers) -> Answered:
    if not isinstance(answer, Answer):
        words = str(answer) or type(answer).__name__
        return Answered(None, "no answer", checkers.verdict(row, ""), words, answer.advice)
    how = answer.unfinished or "ended"
    if answer.cut:
        how = "without an end to its reasoning" if answer.only_reasoning else "cut"
    elif answer.ending == "unstated" and not answer.refused and not answer.text.strip():
        how = "empty"
    return Answered(answer.text, how, checkers.verdict(row, answer.text))


def same_when_merged(options: argparse.Namespace, asked: dict[str, list[Row]]) -> int:
    """Of how many prompts --system-role merge_into_user makes the very one of the control."""
    if options.system_role != "merge_into_user" or len(asked) < 2:
        return 0
    pairs = zip(asked["system"], asked["user"], strict=True)
    return sum(merge_into_user(row.messages) == merge_into_user(other.messages) for row, other in pairs)


def fingerprint(asked: dict[str, list[Row]]) -> str:
    """A checksum of what was asked and of its constraints, by which `compare` knows that two runs asked the same."""
    told = [
        [turn, [[row.key, row.prompt, row.instructions, row.arguments, row.messages] for row in rows]]
        for turn, rows in asked.items()
    ]
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_answers(path: Path, asked: dict[str, list[Row]], found: dict[str, list[Answered]]) -> None:
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


def about_unanswered(
    asked: dict[str, list[Row]], found: dict[str, list[Answered]], places: dict[str, str]
) -> str | None:
    """How many prompts got no answer, and why the first of them; None where all got one."""
    without = [
        f"(key {row.key}, {places[turn]}): {' '.join(one.why.split())[:500]}"
        for turn, rows in asked.items()
        for row, one in zip(rows, found[turn], strict=True)
        if one.why
    ]
    if not without:
        return None
    prompts = f"{len(without):,} prompt{'s' if len(without) > 1 else ''} got no answer and count as following nothing"
    return f"{prompts}; the first {without[0]}"


def percent(share: Share) -> str:
    """`12.3 % [10.0, 14.5]`, or `50.0 % (n = 2)`."""
    shown = f"{100 * share.value:.1f} %"
    if share.low is None or share.high is None:
        return f"{shown} ({share.missing})"
    return f"{shown} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def points(gap: "Estimate") -> str:
    """`-12.3 [-14.5, -10.0]`, in percentage points, or `-50.0 (n = 2)`."""
    shown = f"{100 * gap.mean:+.1f}"
    if gap.low is None or gap.high is None:
        return f"{shown} ({gap.missing})"
    return f"{shown} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def section(
    record: dict[str, Any],
    places: dict[str, str],
    overall: dict[str, dict[str, Share]],
    of_rule: dict[str, dict[str, dict[str, Share]]],
    gap: "dict[str, Estimate] | None",
    unanswered: str | None = None,
) -> str:
    """The section of report.md: how it was measured, what got no answer, the four measures, the rules."""
    data, decoding, checkers = record["data"], record["decoding"], record["checkers"]
    limit, temperature = decoding["max_new_tokens"], decoding["temperature"]
    length = "without a token limit" if limit is None else f"of at most {limit:,} tokens"
    drawn = "the model's own temperature" if temperature is None else f"temperature {temperature:g}"
    asked = f"{counted(data['prompts'], 'prompt')} with {counted(data['constraints'], 'constraint')}"
    lines = [HEADING, "", f"{asked} of {data['file']}"]
    if data["left_out"]:
        lines[-1] += f"; left out, as officially: prompts with {' or '.join(data['left_out'])}"
    lines[-1] += (
        f". Answers {length} at {drawn}"
        f", checked by lm-eval {checkers['lm_eval']} ({checkers['sentences']}; langdetect's seed is 0)."
    )
    if data["drawn_at_random"]:
        keys = ", ".join(map(str, data["drawn_at_random"]))
        lines[-1] += f" The checkers put a random letter in the place of the one that these rows ask for: {keys}."
    for turn in overall:
        endings = record[turn]["endings"]
        lines[-1] += f" Constraints {places[turn]}: " + ", ".join(f"{n:,} {how}" for how, n in endings.items()) + "."
    lines += ["", unanswered] if unanswered else []
    head = "".join(f" {places[turn]} |" for turn in overall)
    lines += ["", f"| |{head}" + (" system less user, points | p |" if gap else "")]
    lines += ["|---|" + "---|" * (len(overall) + 2 * bool(gap))]
    for name, what in MEASURES.items():
        cells = [percent(one[name]) for one in overall.values()]
        cells += [points(gap[name]), f"{gap[name].p:.4f}"] if gap else []
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    if data["same_in_both_turns"]:
        same = f"{data['same_in_both_turns']:,} of {counted(data['prompts'], 'prompt')}"
        lines += ["", f"{same} are those of the control word for word, as merge_into_user makes them: no gap is there."]
    first = next(iter(of_rule.values()))
    lines += ["", "By rule, strict:", "", f"| rule | constraints |{head}", "|---|---|" + "---|" * len(overall)]
    for rule, one in first.items():
        cells = [percent(found[rule]["strict"]) for found in of_rule.values()]
        lines.append(f"| {rule} | {one['strict'].of} | " + " | ".join(cells) + " |")
    lines += ["", *explained] if (explained := explain_missing("\n".join(lines), "prompts")) else []
    return "\n".join(lines) + "\n\n![constraints followed](ifeval.png)\n"


def draw(
    places: dict[str, str],
    overall: dict[str, dict[str, Share]],
    of_rule: dict[str, dict[str, dict[str, Share]]],
    path: Path,
) -> None:
    """The four measures and the strict share of each rule, with intervals, a bar for each turn, as a PNG."""
    pyplot = load_pyplot()
    bars: dict[str, dict[str, Share]] = {
        turn: {name.replace("_", ", "): share for name, share in overall[turn].items()}
        | {rule: found["strict"] for rule, found in of_rule[turn].items()}
        for turn in overall
    }
    names = list(next(iter(bars.values())))
    figure, axes = pyplot.subplots(figsize=(9, 0.35 * len(names) + 1.6), dpi=100, layout="constrained")
    height = 0.8 / len(bars)
    for number, (turn, found) in enumerate(bars.items()):
        rows = [row + (number - (len(bars) - 1) / 2) * height for row in range(len(names))]
        values = [found[name].value for name in names]
        axes.barh(
            rows,
            values,
            height,
            xerr=error_bars((found[name].value, found[name].low, found[name].high) for name in names),
            label=places[turn],
            color="tab:blue" if turn == "system" else "lightgray",
            capsize=2,
        )
    axes.set_yticks(range(len(names)), names)
    axes.axhline(len(MEASURES) - 0.5, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share that is followed (95 %)")
    axes.margins(y=0.01)
    figure.suptitle("Constraints that are followed", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
