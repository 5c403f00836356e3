"""SysBench (arXiv:2408.10943): five user turns under a system message, judged by criterion.

The model answers turn by turn, then a judge says for each answer which criteria it meets. Answers and replies are kept
in sysbench.sqlite, so the same command continues a run that was stopped. Writes sysbench.json, sysbench_rows.jsonl,
sysbench.png and a section of report.md.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError
from train.evaluation.answer_endings import NO_ANSWER, describe_ending
from train.evaluation.judge_options import contact_judge_once, judge_all, refuse_unusable_servers
from train.evaluation.judge_report import (
    judgement_counts,
    refuse_without_verdicts,
    summarize_missing_verdicts,
    verdict_warnings,
)
from train.evaluation.results_dir import Writer, as_json, as_jsonl, fingerprint_of, write_results
from train.evaluation.turns.histories import NOT_ASKED, Answers, History, answer_turns, text_of
from train.evaluation.turns.options import TurnsOptions
from train.evaluation.turns.sysbench_figures import JudgedConversation, figures
from train.evaluation.turns.sysbench_judging import PROMPT_VERSION, REMEDIES, Verdicts, judge_answer
from train.evaluation.turns.sysbench_report import HEADING, plot_curves, section
from train.evaluation.turns.sysbench_rows import OPTION, Conversation, read_conversations
from train.llm.failures import RequestFailed, count_reasons, shown_reasons
from train.llm.judgement import Judgement
from train.llm.request import Answer, Decoding
from train.multifaceted.bench.protocol import decoding_record
from train.pressure.turns import join_turns

if TYPE_CHECKING:
    from train.llm.client import Client

JOURNAL = "sysbench.sqlite"
ROWS = "sysbench_rows.jsonl"


@dataclass(frozen=True)
class _Turn:
    """A turn that has an answer: its place, the messages before the answer, and the text that is judged."""

    conversation: int
    turn: int
    messages: Sequence[dict[str, Any]]
    text: str


def read_sysbench(config: TurnsOptions) -> list[Conversation]:
    """Return all conversations of the file of --sysbench. Raises UserError, also for a judge that cannot be asked."""
    config.require_judge(OPTION)
    config.refuse_extra_of_judge()
    refuse_unusable_servers(config)
    return read_conversations(str(config.sysbench))


def measure_sysbench(config: TurnsOptions, conversations_in_file: Sequence[Conversation], folder: Path) -> None:
    """Ask, have the answers judged, and write rows, figures, plot and report. Raises UserError."""
    conversations = conversations_in_file[: config.conversations]
    answers = _answer(config, conversations, folder)
    turns = _answered_turns(config.history, conversations, answers)
    if not turns:
        failures = [answer for of_each in answers for answer in of_each if isinstance(answer, RequestFailed)]
        advice = next((failure.advice for failure in failures if failure.advice), "")
        reasons = shown_reasons(count_reasons(map(str, failures)))
        raise UserError(f"--model {config.model}: no turn got an answer: {reasons}. {advice}".rstrip())

    async def ask(client: "Client", turn: _Turn) -> Judgement[Verdicts]:
        criteria = [each.text for each in conversations[turn.conversation].turns[turn.turn].criteria]
        return await judge_answer(client, config.judge_decoding(), config.retries, turn.messages, turn.text, criteria)

    judgements, advice = judge_all(config, turns, ask, folder / JOURNAL, wait=config.wait_for_server)
    refuse_without_verdicts(judgements, config.judge, advice, REMEDIES)
    by_place = {(turn.conversation, turn.turn): each for turn, each in zip(turns, judgements, strict=True)}
    judged = [
        JudgedConversation(
            conversation,
            tuple(
                judgement.verdict if (judgement := by_place.get((number, turn))) else None
                for turn in range(len(conversation.turns))
            ),
        )
        for number, conversation in enumerate(conversations)
    ]
    record = _record(config, len(conversations_in_file), judged, answers, judgements)
    rows = [
        _row(each, turn, answers[number][turn], by_place.get((number, turn)))
        for number, each in enumerate(judged)
        for turn in range(len(each.verdicts))
    ]
    text = section(record, rows)
    files: dict[str, Writer] = {
        ROWS: as_jsonl(rows),
        "sysbench.json": as_json(record),
        "sysbench.png": partial(plot_curves, {config.model: record}),
    }
    write_results(folder, files, heading=HEADING, section=text)
    print(text)
    print(f"figures: {folder / 'sysbench.json'}; answers and judgements: {folder / ROWS}")
    for warning in _warnings(config, record):
        print(f"warning: {warning}")


def _answer(config: TurnsOptions, conversations: Sequence[Conversation], folder: Path) -> list[Answers]:
    """Return the model's answers. The judge is contacted before the model's first answer, which may take hours."""
    from train.evaluation.models.responses import open_model

    with open_model(config.local_or_served()) as model:
        return answer_turns(
            model,
            [conversation.dialogue for conversation in conversations],
            config.decoding(),
            folder / JOURNAL,
            history=config.history,
            stage="sysbench",
            wait_for_server=config.wait_for_server,
            before_asking=contact_judge_once(config, config.wait_for_server),
        )


def _answered_turns(history: History, conversations: Sequence[Conversation], answers: Sequence[Answers]) -> list[_Turn]:
    """Return the turns that have an answer, with the messages that the model saw."""
    turns = []
    for number, (conversation, of_each) in enumerate(zip(conversations, answers, strict=True)):
        dialogue = conversation.dialogue
        texts = [text_of(answer) if isinstance(answer, Answer) else "" for answer in of_each]
        earlier = dialogue.references if history == "reference" else texts
        turns += [
            _Turn(number, turn, join_turns(dialogue.message, dialogue.user_turns, earlier[:turn]), texts[turn])
            for turn, answer in enumerate(of_each)
            if isinstance(answer, Answer)
        ]
    return turns


def _record(
    config: TurnsOptions,
    conversations_in_file: int,
    judged: Sequence[JudgedConversation],
    answers: Sequence[Answers],
    judgements: Sequence[Judgement[Verdicts]],
) -> dict[str, Any]:
    """Return the record for sysbench.json."""
    conversations = [each.conversation for each in judged]
    every = [answer for of_each in answers for answer in of_each]
    decoding = config.decoding()
    greedy = Decoding(0, temperature=0.0)
    return {
        "kind": "sysbench",
        "model": config.model,
        "data": {
            "file": str(config.sysbench),
            "conversations": len(judged),
            "of": conversations_in_file,
            "fingerprint": _fingerprint(conversations),
        },
        "history": config.history,
        "decoding": decoding_record(decoding, greedy),
        "respondent": {name: getattr(config, name) for name in ("template", "system_role", "engine", "dtype")},
        "judge": {
            "model": config.judge,
            "prompt_version": PROMPT_VERSION,
            "retries": config.retries,
            **decoding_record(config.judge_decoding(), greedy),
        },
        "seed": config.seed,
        **figures(judged, config.seed),
        "missing": {
            "turns_without_answer": sum(not isinstance(answer, Answer) for answer in every),
            "why_no_answer": count_reasons(str(answer) for answer in every if isinstance(answer, RequestFailed)),
            "turns_without_verdict": sum(each is None for of_each in judged for each in of_each.verdicts),
            "conversations_without_run": sum(each.run_length is None for each in judged),
            "endings": dict(Counter(_ending(answer) for answer in every)),
            "judge": judgement_counts(judgements),
        },
    }


def _fingerprint(conversations: Sequence[Conversation]) -> str:
    """Return a checksum of the conversations, by which `compare` checks that two runs asked the same."""
    return fingerprint_of([asdict(each) for each in conversations])


def _ending(answer: Answer | RequestFailed | None) -> str:
    return NOT_ASKED if answer is None else describe_ending(answer)


def _row(
    judged: JudgedConversation,
    turn: int,
    answer: Answer | RequestFailed | None,
    judgement: Judgement[Verdicts] | None,
) -> dict[str, Any]:
    """Return a line of sysbench_rows.jsonl: a turn, its answer, the verdict on each criterion, the judge's replies."""
    conversation = judged.conversation
    of_turn, verdicts = conversation.turns[turn], judged.verdicts[turn]
    met = verdicts or [None] * len(of_turn.criteria)
    return {
        "system_id": conversation.id,
        "turn": turn + 1,
        "dependent": conversation.dependent,
        "alignment": of_turn.alignment,
        "system": conversation.system,
        "user": of_turn.user,
        "answer": text_of(answer) if isinstance(answer, Answer) else None,
        "how": _ending(answer),
        "why": str(answer) if isinstance(answer, RequestFailed) else None,
        "criteria": [
            {"text": each.text, "type": each.type, "met": verdict}
            for each, verdict in zip(of_turn.criteria, met, strict=True)
        ],
        "holds": judged.holds[turn],
        "missing": judgement.missing if judgement else None,
        "detail": judgement.detail if judgement else None,
        "replies": list(judgement.texts) if judgement else [],
    }


def _warnings(config: TurnsOptions, record: dict[str, Any]) -> list[str]:
    missing = record["missing"]
    of_model = {how: missing["endings"].get(how, 0) for how in (NO_ANSWER, NOT_ASKED)}
    text = summarize_missing_verdicts("turn", missing["judge"]["missing"], of_model)
    text += " (reasons: report.md). The same command requests again what got no answer." if text else ""
    return [*filter(None, [text]), *verdict_warnings(missing["judge"], config.judge, ROWS, REMEDIES)]
