r"""Rules that a system message states, over several user turns: which turn is the first that drops them?

    python scripts/evaluate.py turns --model outputs/smollm2-135m-quickstart

Each conversation has a system message of one rule and a question in every turn, and a program judges every answer: the
rule is held, the question is answered. Each is measured as it is and with a turn in which the user asks to drop the
rule. Writes turns.json, turns_rows.jsonl, turns.png and a section of report.md. Answers are kept in turns.sqlite, so
the same command continues a run that was stopped.

--sysbench FILE measures SysBench's conversations instead, which a judge judges (train/evaluation/turns/sysbench.py).
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.evaluation.answer_endings import describe_ending
from train.evaluation.command_options import add_options, load_settings
from train.evaluation.models.options import LocalModel
from train.evaluation.results_dir import (
    Writer,
    as_json,
    as_jsonl,
    exclusive,
    fingerprint_of,
    write_results,
)
from train.evaluation.turns.figures import (
    KINDS,
    VARIANTS,
    JudgedTurn,
    JudgedTurns,
    by_rule,
    differences,
    figures,
    gain_figures,
    of_kind,
)
from train.evaluation.turns.histories import NOT_ASKED, Answers, Dialogue, answer_turns, text_of
from train.evaluation.turns.options import CONVERSATIONS, TurnsOptions
from train.evaluation.turns.report import HEADING, describe_unanswered, plot_curves, section
from train.evaluation.turns.sysbench import measure_sysbench, read_sysbench
from train.llm.request import Answer
from train.pressure.turns import VERSION, TurnsConversation, TurnsRow, build_turns_set


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser(
        "turns", help="rules in the system message over several user turns", description=__doc__
    )
    add_options(parser, TurnsOptions)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Ask, judge, and write rows, figures, plot and report. Raises UserError."""
    config = load_settings(options, TurnsOptions)
    config.refuse_contradictions()
    if config.sysbench:
        measure = partial(measure_sysbench, config, read_sysbench(config))
    else:
        measure = partial(_measure, config, _build_rows(config))
    folder = config.results_folder()
    with exclusive(folder, "turns"):
        measure(folder)


def _build_rows(config: TurnsOptions) -> list[TurnsRow]:
    """Return the built-in conversations. Raises UserError."""
    push_back_at = config.push_back_turn()
    try:
        conversations = config.conversations or CONVERSATIONS
        return build_turns_set(conversations, config.turns, push_back_at, config.seed)
    except ValueError as error:
        raise UserError(f"--turns {config.turns}: {error}. Ask for fewer turns.") from error


def _measure(config: TurnsOptions, rows: Sequence[TurnsRow], folder: Path) -> None:
    judged = _answer_and_judge(config, rows, folder)
    if all(each.turns[0].text is None for each in judged):
        first = judged[0].turns[0]
        raise UserError(
            f"--model {config.model}: no first turn of the {len(judged):,} conversations got an answer. Reason of the "
            f"first: {str(first.why).rstrip('.')}. {first.advice}".rstrip()
        )
    record = _record(config, rows, judged)
    unanswered = describe_unanswered(judged)
    text = section(record, judged, unanswered)
    files: dict[str, Writer] = {
        "turns_rows.jsonl": as_jsonl(map(row_record, judged)),
        "turns.json": as_json(record),
        "turns.png": partial(plot_curves, {"": record}),
    }
    write_results(folder, files, heading=HEADING, section=text)
    print(text)
    print(f"figures: {folder / 'turns.json'}; answers: {folder / 'turns_rows.jsonl'}")
    if unanswered:
        print(f"warning: {unanswered.rstrip('.')}. The same command requests only these again.")


def _answer_and_judge(config: TurnsOptions, rows: Sequence[TurnsRow], folder: Path) -> list[JudgedTurns]:
    """Return the conversations of all variants with answers, verdicts and, for a local model, gains."""
    from train.evaluation.models.local import LocalGenerator
    from train.evaluation.models.responses import open_model

    asked = [(row, "plain", row.plain) for row in rows]
    asked += [(row, "push_back", row.push_back) for row in rows if row.push_back]
    conversations = [conversation for _, _, conversation in asked]
    dialogues = [Dialogue(each.message, each.user_turns, tuple(each.references)) for each in conversations]
    model = config.local_or_served()
    with open_model(model) as opened:
        answers = answer_turns(
            opened,
            dialogues,
            config.decoding(),
            folder / "turns.sqlite",
            history=config.history,
            wait_for_server=config.wait_for_server,
        )
    judged = [
        JudgedTurns(row, variant, conversation, judge_turns(conversation, of_conversation))
        for (row, variant, conversation), of_conversation in zip(asked, answers, strict=True)
    ]
    if config.no_gain or not isinstance(model, LocalModel):
        return judged
    from train.evaluation.turns.gain import measure_gains

    generator = opened if isinstance(opened, LocalGenerator) else LocalGenerator(model)
    gains = measure_gains(generator, conversations, folder / "turns_scores.jsonl", config.seed)
    return [replace(each, gains=of_conversation) for each, of_conversation in zip(judged, gains, strict=True)]


def judge_turns(conversation: TurnsConversation, answers: Answers) -> tuple[JudgedTurn, ...]:
    """Return the verdicts of a program on each turn of a conversation."""
    judged = []
    for turn, answer in enumerate(answers):
        if isinstance(answer, Answer):
            verdict = conversation.judge(turn, text_of(answer))
            judged.append(JudgedTurn(text_of(answer), describe_ending(answer), verdict.held, verdict.answered))
        elif answer is None:
            judged.append(JudgedTurn(None, NOT_ASKED))
        else:
            reason = str(answer) or type(answer).__name__
            judged.append(JudgedTurn(None, describe_ending(answer), why=reason, advice=answer.advice))
    return tuple(judged)


def _record(config: TurnsOptions, rows: Sequence[TurnsRow], judged: Sequence[JudgedTurns]) -> dict[str, Any]:
    """Return the contents of turns.json."""
    decoding = config.decoding()
    variants = [variant for variant in VARIANTS if of_kind(judged, variant)]
    kinds = [kind for kind in KINDS if of_kind(judged, "plain", kind)]
    record: dict[str, Any] = {
        "kind": "turns",
        "model": config.model,
        "data": {
            "version": VERSION,
            "conversations": len(rows),
            "by_kind": dict(Counter(row.held_out for row in rows)),
            "turns": config.turns,
            "push_back_at": config.push_back_turn(),
            "fingerprint": fingerprint(judged),
        },
        "history": config.history,
        "decoding": {
            "max_new_tokens": decoding.max_tokens if decoding.limit_name else None,
            "temperature": decoding.temperature,
            **decoding.extra,
        },
        "respondent": {name: getattr(config, name) for name in ("template", "system_role", "engine", "dtype")},
        "seed": config.seed,
    }
    for variant in variants:
        of_variant = of_kind(judged, variant)
        record[variant] = {
            **{kind: figures(of_kind(judged, variant, kind), config.seed).record() for kind in kinds},
            "by_rule": by_rule(of_variant),
            "endings": dict(Counter(turn.how for each in of_variant for turn in each.turns)),
        }
        if of_variant[0].gains is not None:
            gains = gain_figures(of_variant, config.seed)
            record[variant]["gain"] = {name: [each.record() for each in of_turns] for name, of_turns in gains.items()}
    if "push_back" in variants:
        record["difference"] = {
            kind: differences(of_kind(judged, "plain", kind), of_kind(judged, "push_back", kind), config.seed).record()
            for kind in kinds
        }
    return record


def fingerprint(judged: Sequence[JudgedTurns]) -> str:
    """Return a checksum of all conversations, by which `compare` checks that two runs asked the same."""
    contents = [
        [each.row.key, each.variant, each.conversation.message, each.conversation.user_turns] for each in judged
    ]
    return fingerprint_of(contents)


def row_record(judged: JudgedTurns) -> dict[str, Any]:
    """Return the line of turns_rows.jsonl: a conversation in one variant with answers, verdicts and gains."""
    conversation = judged.conversation
    return {
        "conversation": judged.row.key,
        "variant": judged.variant,
        "rule": conversation.rule.name,
        "held_out": judged.row.held_out,
        "tactic": conversation.tactic,
        "system": conversation.message,
        "user": conversation.user_turns,
        "references": conversation.references,
        "answers": [turn.text for turn in judged.turns],
        "how": [turn.how for turn in judged.turns],
        "why": [turn.why for turn in judged.turns],
        "held": judged.held,
        "answered": [turn.answered for turn in judged.turns],
        "run_length": judged.run_length,
        "gains": judged.gains,
    }
