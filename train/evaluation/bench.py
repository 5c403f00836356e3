r"""Multifaceted Bench: responses graded by a judge with the protocol of the JANUS paper.

    python scripts/evaluate.py bench --model outputs/smollm2-135m-quickstart \
        --data recipes/smollm2-135m/data/bench.jsonl \
        --judge Qwen/Qwen2.5-14B-Instruct \
        --judge-server http://localhost:8000/v1

    python scripts/evaluate.py bench --config recipes/bench/qwen2.5-judge.yaml \
        --model outputs/smollm2-135m-quickstart

The averages are defined in train/multifaceted/bench/scoring.py. Writes bench.json, bench_rows.jsonl, bench.png and a
section of report.md. Every answer is kept in bench.sqlite, so the same command continues a run that was stopped.
"""

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError
from train.evaluation.bench_config import COMMON, RESPONSE_FIELDS, BenchConfig
from train.evaluation.command_options import add_options, load_settings
from train.evaluation.judge_options import JUDGE_FIELDS, contact_judge, refuse_unusable_servers, with_judge
from train.evaluation.required_paths import require_model
from train.evaluation.results_dir import as_json, as_jsonl, exclusive, output_folder, write_results
from train.formatting import format_count
from train.recipe import Source

if TYPE_CHECKING:
    from train.evaluation.models.rewards import RewardModel
    from train.llm.client import Client
    from train.llm.failures import RequestFailed
    from train.llm.request import Answer
    from train.multifaceted.bench.batch_api import BatchAnswers, BatchJudgeClient
    from train.multifaceted.bench.pairwise import PairwiseComparison
    from train.multifaceted.bench.rows import Bench, GivenResponses
    from train.multifaceted.bench.scoring import JudgedRow, Response

JOURNAL = "bench.sqlite"


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser("bench", help="Multifaceted Bench: responses graded by a judge", description=__doc__)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings as YAML (recipes/bench); the options override them"
    )
    add_options(parser, BenchConfig, common=COMMON)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Collect the responses, have them judged, and write the results. Raises UserError."""
    config = load_settings(options, BenchConfig)
    config.refuse_contradictions()
    if not (config.server or config.responses):
        require_model("--model", config.model)
    folder = output_folder(config.model, config.output_dir, remedy="Add --output-dir FOLDER.")
    if config.batch_out and Path(config.batch_out).exists():
        raise UserError(
            f"--batch-out {config.batch_out}: exists already. Name a new file, so that no request is sent twice."
        )
    with exclusive(folder, "bench"):
        _measure(config, folder)


def _measure(config: BenchConfig, folder: Path) -> None:
    from train.evaluation.models.rewards import open_reward_model
    from train.multifaceted.bench.rows import read_bench
    from train.multifaceted.bench.scoring import refuse_without_judgements, refuse_without_responses

    sources = [Source(path=path, split=config.split) for path in config.data]
    _refuse_unusable_judge(config)
    reward_model = open_reward_model(config.reward_model, config.dtype) if config.reward_model else None
    bench = read_bench(sources, config.limit)
    if len(bench.rows) < bench.rows_in_data:
        print(
            f"--limit {config.limit}: {len(bench.rows):,} of {bench.rows_in_data:,} rows, not the complete bench",
            flush=True,
        )
    if config.responses:
        responses = _read_responses(config, bench)
        refuse_without_responses(responses, f"--responses {config.responses}")
    else:
        responses, advice = _ask_model(config, bench, folder)
        refuse_without_responses(responses, f"--model {config.model}", advice)
    if reward_model:
        responses = _score(reward_model, config, bench, responses, folder)
    judged, advice = _judge(config, bench, responses, folder)
    refuse_without_judgements(judged, f"--judge {config.judge}", advice, batch=not config.judge_server)
    _write(config, bench, judged, folder)


def _refuse_unusable_judge(config: BenchConfig) -> None:
    """Raise UserError for what would end the run only after the model has answered, which may take hours."""
    from train.multifaceted.bench.batch_api import read_batch
    from train.multifaceted.bench.judging import PROMPT_VERSION
    from train.multifaceted.bench.pairwise import read_protocol, read_results
    from train.multifaceted.bench.protocol import protocol_of, refuse_other_protocol, settings_of

    refuse_unusable_servers(config)
    read_batch(config.batch_in)
    if config.against:
        against = Path(config.against)
        theirs = protocol_of(read_protocol(against, read_results(against)))
        ours = settings_of(config.protocol(), PROMPT_VERSION, None if config.responses else config.response_decoding())
        refuse_other_protocol("this run", ours, f"--against {config.against}", theirs)


def _read_responses(config: BenchConfig, bench: "Bench") -> "list[list[Response]]":
    """Return the responses of the file of --responses, per row."""
    from train.llm.reasoning import format_advice
    from train.multifaceted.bench.rows import read_responses

    given, unmatched = read_responses(str(config.responses), bench.rows)
    if unmatched:
        print(f"--responses: {format_count(unmatched, 'line', 'belongs', 'belong')} to no row of this run", flush=True)
    events: Counter[str] = Counter()
    responses = [_responses_of(row.id, given.get(row.id), config, events) for row in bench.rows]
    for line in format_advice(events):
        print(f"warning: {line}", flush=True)
    return responses


def _responses_of(
    id: str, answers: "GivenResponses | None", config: BenchConfig, events: Counter[str]
) -> "list[Response]":
    """Return one row's responses without reasoning, whose events go into `events`. Raises UserError."""
    from train.llm.reasoning import list_events, without_reasoning
    from train.multifaceted.bench.scoring import Response

    if answers is None or not answers.texts:
        return [Response(None, "no line in --responses")]
    if len(answers.texts) > config.best_of and config.best_of == 1:
        raise UserError(
            f"--responses {config.responses}: row {id!r} has {len(answers.texts)} responses. Write "
            f"--best-of {len(answers.texts)}, or leave one response in."
        )
    if config.best_of > 1 and config.pick_by == "file" and answers.scores is None:
        raise UserError(f"--pick-by file: row {id!r} of {config.responses} has no `scores`.")
    scores: Sequence[float | None] = answers.scores or [None] * len(answers.texts)
    responses = []
    for text, score in list(zip(answers.texts, scores, strict=True))[: config.best_of]:
        answer = without_reasoning(text)
        events.update(f"--responses: {event}" for event in list_events(answer))
        responses.append(Response(answer.text, given_score=score, only_reasoning=answer.unfinished))
    return responses


def _ask_model(config: BenchConfig, bench: "Bench", folder: Path) -> "tuple[list[list[Response]], str]":
    """Return the model's responses, and the option to change if its server refused some."""
    from train.evaluation.models.responses import generate_answers
    from train.llm.failures import RequestFailed
    from train.llm.refusals import option_formatter
    from train.multifaceted.bench.scoring import conversation

    answers = generate_answers(
        config.local_or_served(),
        [conversation(row, with_system=not config.no_system) for row in bench.rows],
        config.response_decoding(),
        folder / JOURNAL,
        samples=config.best_of,
        stage="bench response",
        description="responses",
        wait_for_server=config.wait_for_server,
        before_asking=partial(contact_judge, config, config.wait_for_server),
        format_setting=option_formatter(RESPONSE_FIELDS),
    )
    failures = [answer for of_row in answers for answer in of_row if isinstance(answer, RequestFailed)]
    responses = [[_as_response(answer) for answer in of_row] for of_row in answers]
    return responses, next((failure.advice for failure in failures if failure.advice), "")


def _as_response(answer: "Answer | RequestFailed") -> "Response":
    from train.llm.failures import RequestFailed
    from train.multifaceted.bench.scoring import Response

    if isinstance(answer, RequestFailed):
        return Response(None, str(answer))
    return Response(
        answer.text, finish_reason=answer.finish_reason, only_reasoning=answer.only_reasoning, refused=answer.refused
    )


def _score(
    reward_model: "RewardModel",
    config: BenchConfig,
    bench: "Bench",
    responses: "list[list[Response]]",
    folder: Path,
) -> "list[list[Response]]":
    """Return the responses with their rewards as scores."""
    from train.evaluation.models.rewards import score_answers
    from train.multifaceted.bench.scoring import conversation

    prompts = [conversation(row, with_system=not config.no_system) for row in bench.rows]
    scored = [
        [*prompt, {"role": "assistant", "content": response.text}]
        for prompt, of_row in zip(prompts, responses, strict=True)
        for response in of_row
        if response.text is not None
    ]
    rewards = iter(score_answers(reward_model, scored, folder / JOURNAL, config.batch_size))
    return [
        [response if response.text is None else replace(response, given_score=next(rewards)) for response in of_row]
        for of_row in responses
    ]


def _judge(
    config: BenchConfig, bench: "Bench", responses: "list[list[Response]]", folder: Path
) -> "tuple[list[JudgedRow], str]":
    """Return the judged rows, from servers or batch files, and the option to change if requests were refused."""
    from train.llm.journal import Journal
    from train.llm.refusals import option_formatter
    from train.multifaceted.bench.batch_api import BatchJudgeClient, read_batch
    from train.multifaceted.bench.scoring import judge_rows

    async def ask(client: "Client | BatchJudgeClient") -> "list[JudgedRow]":
        return await judge_rows(client, config.protocol(), bench.rows, responses)

    batch = read_batch(config.batch_in)
    with Journal(folder / JOURNAL) as journal:
        if config.judge_server:
            return with_judge(config, journal, ask, wait=config.wait_for_server)
        client = BatchJudgeClient(journal, config.judge, batch, option_formatter(JUDGE_FIELDS, "judge-"))
        judged = asyncio.run(ask(client))
    _report_batch(config, batch, client)
    return judged, client.advice


def _report_batch(config: BenchConfig, batch: "BatchAnswers", client: "BatchJudgeClient") -> None:
    """Print what the files of --batch-in hold, and write the missing questions to --batch-out."""
    from train.multifaceted.bench.batch_api import write_batch

    if batch.lines:
        print(f"--batch-in: {format_count(batch.lines, 'line')}, {len(batch.answers):,} with an answer", flush=True)
        for reason, count in batch.failed.most_common(5):
            print(f"--batch-in: {count:,} failed, and are asked again: {reason}", flush=True)
        if unmatched := len(batch.answers.keys() - client.matched):
            belong = format_count(unmatched, "answer", "belongs", "belong")
            print(f"--batch-in: {belong} to none of these questions (other rows, responses or judge?)")
    missing = len(client.missing)
    if missing and config.batch_out:
        files = write_batch(client.missing, config.judge, Path(config.batch_out))
        print(f"{format_count(missing, 'question')} for the judge: {', '.join(map(str, files))}")
    elif missing:
        have = format_count(missing, "question", "has", "have")
        print(f"{have} no answer yet: --batch-out FILE writes the missing questions, for the next batch")
    elif config.batch_out:
        print("the judge has answered everything: --batch-out wrote nothing")
    if client.advice:
        print(f"--batch-in: {client.advice}")


def _write(config: BenchConfig, bench: "Bench", judged: "list[JudgedRow]", folder: Path) -> None:
    """Write bench_rows.jsonl, bench.json, bench.png and the section of report.md, and print the section."""
    from train.multifaceted.bench.protocol import noted_of, protocol_of
    from train.multifaceted.bench.report import (
        HEADING,
        make_record,
        markdown,
        no_judgement_finished,
        plot_scores,
        warnings,
    )
    from train.multifaceted.bench.scoring import row_record

    record = make_record(
        config.model,
        bench,
        judged,
        config.protocol(),
        decoding=None if config.responses else config.response_decoding(),
        with_system=None if config.responses else not config.no_system,
        data=config.data,
        respondent={name: getattr(config, name) for name in ("template", "system_role", "engine", "dtype")},
        seed=config.seed,
    )
    rows = folder / "bench_rows.jsonl"
    if config.against and rows.exists() and Path(config.against).exists() and rows.samefile(config.against):
        raise UserError(f"--against {config.against}: this command writes that file.")
    settings = protocol_of(record) | noted_of(record)
    write_results(folder, {rows.name: as_jsonl(row_record(row, settings) for row in judged)})
    try:
        comparison, comparison_error = _compare_with(config, rows, record), None
    except UserError as error:  # raised last: the figures of this run are as good without it
        comparison, comparison_error = None, error
    if comparison:
        record["against"] = comparison.record()
    has_score = record["score"]["mean"] is not None
    text = markdown(record, judged, batch=not config.judge_server)
    if comparison:
        text += f"\nAgainst {config.against}:\n\n{comparison.markdown()}"
    plots = {"bench.png": partial(plot_scores, record)} if has_score else {}
    write_results(folder, {"bench.json": as_json(record), **plots}, heading=HEADING, section=text)
    if not has_score:
        (folder / "bench.png").unlink(missing_ok=True)  # of an earlier run
    print(text)
    print(f"figures: {folder / 'bench.json'}; answers and judgements: {rows}")
    if refusal := no_judgement_finished(record):
        raise UserError(refusal)
    for warning in warnings(record, batch=not config.judge_server):
        print(f"warning: {warning}")
    if comparison_error:
        raise comparison_error


def _compare_with(config: BenchConfig, rows: Path, record: dict[str, Any]) -> "PairwiseComparison | None":
    """Return the comparison with the rows of --against, if it was given and this run has scores. Raises UserError."""
    from train.multifaceted.bench.pairwise import compare_pairwise

    if not config.against:
        return None
    if not record["complete"] and record["score"]["mean"] is None:
        print(f"--against {config.against}: compared once the judge has answered", flush=True)
        return None
    return compare_pairwise(rows, Path(config.against), good=config.good, seed=config.seed)
