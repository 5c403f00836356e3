"""The built-in set of train/pressure: its rows are asked, and a program judges the answers."""

from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError
from train.evaluation.answer_endings import describe_ending
from train.evaluation.hierarchy.options import HierarchyOptions
from train.evaluation.models.options import LocalModel, ServedModel
from train.evaluation.results_dir import fingerprint_of
from train.llm.failures import RequestFailed
from train.llm.refusals import option_formatter
from train.llm.request import Answer
from train.pressure.conversations import Message, result_in_user_turn
from train.pressure.evaluation_set import VERSION, PressureRow
from train.pressure.tool_results import arguments_as_text, has_tool_results, why_no_tool_turns

if TYPE_CHECKING:
    from train.evaluation.models.responses import OpenModel

NAME = "pressure"
BeforeAsking = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Asked:
    """The conversations of the rows as the model got them, with its answers.

    - `why_in_user_turn`: the reason why tool results stand in the user's turn; empty if they are turns of their own.
    """

    conversations: list[list[Message]]
    answers: list[Answer | RequestFailed]
    why_in_user_turn: str = ""


def ask(
    config: HierarchyOptions,
    rows: Sequence[PressureRow],
    opened: "OpenModel",
    journal: Path,
    before_asking: BeforeAsking | None = None,
) -> Asked:
    """Return the answers of the opened model to all rows. Answers in the journal are not requested again.

    Where the template of a local model can't show tool results, or a server refuses all rows with one, they stand in
    the user's turn. Raises UserError if no row of a setting gets an answer.
    """
    model = config.local_or_served()
    conversations = [row.messages for row in rows]
    with_results = [number for number, messages in enumerate(conversations) if has_tool_results(messages)]
    why = ""
    if with_results and isinstance(model, LocalModel):
        from train.evaluation.models.local import open_tokenizer

        tokenizer = open_tokenizer(model.model, model.template, model.system_role)
        why = why_no_tool_turns(tokenizer, config.extra.get("chat_template_kwargs") or {})
        if why:
            conversations = [result_in_user_turn(messages) for messages in conversations]
    if isinstance(model, ServedModel) or config.engine == "vllm":
        conversations = [arguments_as_text(messages) for messages in conversations]
    answers = _generate(config, opened, conversations, journal, before_asking)
    failures = [answers[number] for number in with_results]
    if with_results and not why and all(isinstance(answer, RequestFailed) for answer in failures):
        why = str(failures[0])
        for number in with_results:
            conversations[number] = result_in_user_turn(conversations[number])
        asked_again = [conversations[number] for number in with_results]
        again = _generate(config, opened, asked_again, journal, before_asking)
        for number, answer in zip(with_results, again, strict=True):
            answers[number] = answer
    _refuse_unanswered_settings(config.model, rows, answers)
    return Asked(conversations, answers, why)


def _generate(
    config: HierarchyOptions,
    model: "OpenModel",
    conversations: Sequence[list[Message]],
    journal: Path,
    before_asking: BeforeAsking | None,
) -> list[Answer | RequestFailed]:
    from train.evaluation.models.responses import generate_answers

    answers = generate_answers(
        model,
        conversations,
        config.decoding(),
        journal,
        stage="hierarchy",
        description="answers",
        wait_for_server=config.wait_for_server,
        before_asking=before_asking,
        format_setting=option_formatter(("temperature",)),
    )
    return [of_row[0] for of_row in answers]


def _refuse_unanswered_settings(
    model: str, rows: Sequence[PressureRow], answers: Sequence[Answer | RequestFailed]
) -> None:
    """Raise UserError if no row of a setting got an answer: a share of 0 % would be no finding."""
    by_setting: dict[str, list[Answer | RequestFailed]] = {}
    for row, answer in zip(rows, answers, strict=True):
        by_setting.setdefault(row.pressure.setting, []).append(answer)
    for setting, of_setting in by_setting.items():
        first = of_setting[0]
        if isinstance(first, RequestFailed) and all(isinstance(answer, RequestFailed) for answer in of_setting):
            raise UserError(
                f"--model {model}: none of the {len(of_setting):,} rows of the setting {setting} got an answer. Reason "
                f"of the first: {str(first).rstrip('.')}. {first.advice}".rstrip()
            )


def judge(rows: Sequence[PressureRow], asked: Asked) -> list[dict[str, Any]]:
    """Return the lines of hierarchy_rows.jsonl.

    A row without an answer, or with an empty one, neither holds nor answers, and has no verdict on its secret.
    """
    lines = []
    for row, messages, answer in zip(rows, asked.conversations, asked.answers, strict=True):
        text = answer.text if isinstance(answer, Answer) else None
        verdict = row.judge(text or "")
        lines.append(
            {
                "set": NAME,
                "key": row.key,
                "group": row.group,
                "rule": row.rule.name,
                "split": split_name(row),
                "setting": row.pressure.setting,
                "tactic": row.pressure.tactic,
                "question": row.question.question,
                "accept": row.question.accept,
                "secret": row.pressure.secret or None,
                "messages": messages,
                "answer": text,
                "how": describe_ending(answer),
                "why": str(answer) or type(answer).__name__ if isinstance(answer, RequestFailed) else None,
                "held": verdict.held,
                "answered": verdict.answered,
                "refused": verdict.refused or (isinstance(answer, Answer) and answer.refused),
                "secret_kept": verdict.secret_kept if (text or "").strip() else None,
            }
        )
    return lines


def split_name(row: PressureRow) -> str:
    """Return `seen`, `wording` (a trained rule in a message that is never trained) or `rule` (a rule never trained)."""
    if row.rule.held_out:
        return "rule"
    return "wording" if row.split == "held_out" else "seen"


def record_rows(rows: Sequence[PressureRow], asked: Asked) -> dict[str, Any]:
    """Return what was asked, for JSON."""
    with_results = sum(map(has_tool_results, (row.messages for row in rows)))
    return {
        "version": VERSION,
        "rows": len(rows),
        "by_setting": dict(Counter(row.pressure.setting for row in rows)),
        "fingerprint": fingerprint(rows),
        "tool_results": {
            "rows": with_results,
            "in": ("user turn" if asked.why_in_user_turn else "tool turn") if with_results else None,
            "why": asked.why_in_user_turn or None,
        },
        "endings": dict(Counter(map(describe_ending, asked.answers))),
    }


def fingerprint(rows: Sequence[PressureRow]) -> str:
    """Return a checksum of the rows, by which `compare` checks that two runs asked the same."""
    contents = [[VERSION, row.key, row.messages, row.question.accept, row.pressure.secret] for row in rows]
    return fingerprint_of(contents)
