r"""Answers to Multifaceted Bench, graded by a judge as the JANUS paper does it.

    python scripts/evaluate.py bench --model outputs/smollm2-135m-quickstart \
        --data recipes/smollm2-135m/data/bench.jsonl \
        --judge Qwen/Qwen2.5-14B-Instruct \
        --judge-server http://localhost:8000/v1

train/multifaceted/bench/scoring.py says what is averaged. Writes bench.json, bench_rows.jsonl, bench.png and a section into
report.md. Every answer is kept in bench.sqlite, so the same command continues a run that was stopped.
"""

import argparse
import asyncio
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.cli import float_or_null, int_up_to, json_object, non_negative_int, positive_int
from train.errors import UserError, replace_in_errors
from train.evaluation.folders import require_file, require_model, require_results_folder
from train.evaluation.results_dir import exclusive
from train.formatting import format_count
from train.recipe import Source
from train.reporting.markdown import replace_section
from train.storage.atomic_write import atomic_write, write_text
from train.storage.local_paths import parse_path_or_id

if TYPE_CHECKING:
    from train.llm.server import Server
    from train.multifaceted.bench.protocol import Protocol
    from train.multifaceted.bench.rows import Bench
    from train.multifaceted.bench.scoring import JudgedRow, Response

JOURNAL = "bench.sqlite"
_OWN = ("temperature", "top_p", "repetition_penalty")
"""Request fields of the answers that have options of their own, beside the token limit."""
_JUDGES_OWN = ("temperature", "top_p")


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    from train.evaluation.models.options import add_respondent
    from train.multifaceted.bench.protocol import (
        GOOD,
        HUB_ID,
        MOST_ANSWERS,
        MOST_RUNS,
        PAPERS_DECODING,
        PAPERS_JUDGE,
        PAPERS_RESPONSES,
        PAPERS_RUNS,
    )

    parser = commands.add_parser(
        "bench", help="Multifaceted Bench: answers graded by a judge, rubric by rubric", description=__doc__
    )
    add_respondent(parser)
    what = parser.add_argument_group("what is answered")
    what.add_argument(
        "--data", type=parse_path_or_id, nargs="+", default=[HUB_ID], help=f"rows of the bench (default {HUB_ID})"
    )
    what.add_argument("--split", default="train", help="the split of data that has several (default train)")
    what.add_argument(
        "--limit", type=positive_int, help="number of rows, from the first: not the whole bench (default all)"
    )
    what.add_argument("--no-system", action="store_true", help="leave the system messages out: the paper's ablation")
    what.add_argument(
        "--responses",
        type=parse_path_or_id,
        metavar="FILE",
        help="answers that are there already; --model is then a name only",
    )
    what.add_argument(
        "--best-of",
        type=int_up_to(MOST_ANSWERS),
        default=1,
        metavar="N",
        help=f"N answers a row, one of them picked (at most {MOST_ANSWERS:,}, as the judge grades them all)",
    )
    what.add_argument(
        "--pick-by",
        choices=("first-run", "all-runs", "file"),
        default="first-run",
        help="pick by the judge's first run and score by the others (default), by all its runs (an upper bound), or by "
        "`scores` in the file of --responses",
    )
    drawn = parser.add_argument_group("how answers are drawn (defaults: the paper's)")
    drawn.add_argument(
        "--max-tokens", type=positive_int, default=PAPERS_RESPONSES.max_tokens, help="most tokens of an answer"
    )
    drawn.add_argument(
        "--temperature",
        type=float_or_null,
        default=PAPERS_RESPONSES.temperature,
        help="sampling temperature; 0 = greedy; null, here and below = not sent, so the server's own",
    )
    drawn.add_argument("--top-p", type=float_or_null, default=PAPERS_RESPONSES.top_p, help="nucleus sampling")
    drawn.add_argument(
        "--repetition-penalty",
        type=float_or_null,
        default=PAPERS_RESPONSES.extra["repetition_penalty"],
        help="1 = none, and not sent, as null, for servers that don't know it",
    )
    judge = parser.add_argument_group("the judge (defaults: the paper's)")
    judge.add_argument("--judge", required=True, metavar="MODEL", help=f"the paper's was {PAPERS_JUDGE}")
    judge.add_argument(
        "--judge-server", action="append", default=[], metavar="URL", help="address of its server; may be repeated"
    )
    judge.add_argument(
        "--judge-concurrency", type=positive_int, default=64, help="requests at once to each (default 64)"
    )
    judge.add_argument("--judge-key-variable", metavar="NAME", help="the environment variable that holds its key")
    judge.add_argument(
        "--judge-max-tokens", type=positive_int, default=PAPERS_DECODING.max_tokens, help="most tokens of a judgement"
    )
    judge.add_argument(
        "--judge-temperature",
        type=float_or_null,
        default=PAPERS_DECODING.temperature,
        help="sampling temperature; null = not sent",
    )
    judge.add_argument(
        "--judge-top-p", type=float_or_null, default=PAPERS_DECODING.top_p, help="nucleus sampling; null = not sent"
    )
    judge.add_argument(
        "--judge-extra",
        type=json_object,
        default={},
        metavar="JSON",
        help='more fields of each request; null = that one is not sent; {"max_completion_tokens": 4096} replaces '
        "--judge-max-tokens",
    )
    judge.add_argument(
        "--runs",
        type=int_up_to(MOST_RUNS),
        default=PAPERS_RUNS,
        help=f"runs averaged (default {PAPERS_RUNS}; at most {MOST_RUNS}, which leave a tenth of the luck of one, and "
        "each asks about every rubric again)",
    )
    judge.add_argument(
        "--retries",
        type=non_negative_int,
        default=3,
        help="how often an answer without a score is asked for again (default 3)",
    )
    judge.add_argument(
        "--show-system", action="store_true", help="the judge sees the system message: not the paper's protocol"
    )
    judge.add_argument(
        "--batch-out", type=Path, metavar="FILE", help="write the requests to the judge as batch files, and send none"
    )
    judge.add_argument(
        "--batch-in", type=Path, nargs="+", default=[], metavar="FILE", help="output and error files of such a batch"
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output-dir",
        type=Path,
        help="where bench.json, bench_rows.jsonl, bench.png and the journal go (default the folder of --model)",
    )
    results.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="bench_rows.jsonl of another model, measured with the same settings, to compare",
    )
    results.add_argument(
        "--good", type=float, default=GOOD, help=f"score from which a tie counts as both good (default {GOOD:g})"
    )
    results.add_argument("--seed", type=non_negative_int, default=0, help="seed of the intervals (default 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Answer, judge, and write what came of it. Raises UserError."""
    folder = _folder(options)
    _refuse_contradictions(options)
    with exclusive(folder, "bench"):
        _measure(options, folder)


def _measure(options: argparse.Namespace, folder: Path) -> None:
    from pydantic import ValidationError

    from train.multifaceted.bench.rows import read_bench
    from train.multifaceted.bench.scoring import refuse_without_judgements, refuse_without_responses

    try:
        sources = [Source(path=path, split=options.split) for path in options.data]
    except ValidationError as fault:
        raise UserError(f"--data or --split: {fault.errors()[0]['msg']}") from fault
    _refuse_what_can_not_judge(options)
    bench = read_bench(sources, options.limit)
    if len(bench.rows) < bench.of:
        print(f"--limit {options.limit}: {len(bench.rows):,} of {bench.of:,} rows, not the whole bench", flush=True)
    if options.responses:
        responses = _given(options, bench)
        refuse_without_responses(responses, f"--responses {options.responses}")
    else:
        responses, advice = _asked(options, bench, folder)
        refuse_without_responses(responses, f"--model {options.model}", advice)
    judged, advice = _judge(options, bench, responses, folder)
    refuse_without_judgements(judged, f"--judge {options.judge}", advice, batch=not options.judge_server)
    _write(options, bench, judged, folder)


def _folder(options: argparse.Namespace) -> Path:
    folder: Path = options.output_dir or Path(options.model)
    if not options.output_dir:
        require_results_folder("--model", options.model, "Say --output-dir DIR as well.")
    if not (options.server or options.responses):
        require_model("--model", options.model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(f"--output-dir {folder}: can't be made: {fault.strerror}.") from fault
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output-dir {folder}: can't be written to.")
    return folder


def _refuse_contradictions(options: argparse.Namespace) -> None:
    from train.evaluation.models.options import refuse_extra_fields

    batch = bool(options.batch_out or options.batch_in)
    if batch == bool(options.judge_server):
        raise UserError(
            "Who judges? Name either --judge-server URL, or files of a batch by --batch-out and --batch-in."
        )
    if options.batch_out and options.batch_out.exists():
        raise UserError(
            f"--batch-out {options.batch_out}: is there already. Name a new file, so that none is sent twice."
        )
    if options.best_of > 1 and options.pick_by == "first-run" and options.runs < 2:
        raise UserError(
            f"--best-of {options.best_of} --runs 1: the first run picks, so none is left to score. Say --runs 2 or "
            "more, or --pick-by all-runs, whose score is an upper bound."
        )
    if options.best_of > 1 and options.pick_by == "file" and not options.responses:
        raise UserError("--pick-by file: the scores stand in a file of --responses, which isn't named.")
    if options.against:
        require_file("--against", options.against)
    if not 1 <= options.good <= 5:
        raise UserError(f"--good {options.good:g}: a score, from 1 to 5.")
    if options.best_of == 1 and options.pick_by != "first-run":
        raise UserError(f"--pick-by {options.pick_by}: there is one answer to each row. Say --best-of N as well.")
    if options.no_system and options.responses:
        raise UserError("--no-system: the answers of --responses are there already; leave one of the two out.")
    for prefix, names in (("", _OWN), ("judge_", _JUDGES_OWN)):
        own = {
            name: (f"--{prefix}{name}".replace("_", "-"), getattr(options, f"{prefix}{name}"))
            for name in ("max_tokens", *names)
        }
        refuse_extra_fields(f"--{prefix}extra".replace("_", "-"), getattr(options, f"{prefix}extra"), own)
    if options.extra and options.responses:
        raise UserError("--extra: the answers of --responses are there already; leave one of the two out.")
    for name, most in (("temperature", None), ("judge_temperature", None), ("top_p", 1), ("judge_top_p", 1)):
        value = getattr(options, name)
        if value is not None and (not 0 <= value < float("inf") or (most and not 0 < value <= most)):
            raise UserError(f"--{name.replace('_', '-')} {value:g}: {'above 0, up to 1' if most else 'at least 0'}.")
    penalty = options.repetition_penalty
    if penalty is not None and not 0 < penalty < float("inf"):
        raise UserError(f"--repetition-penalty {penalty:g}: above 0; 1 = none.")


def _refuse_what_can_not_judge(options: argparse.Namespace) -> None:
    """All that would end the run after the model has answered, which may take hours."""
    from train.evaluation.models.options import server_options
    from train.llm.concurrency import Backoff
    from train.llm.server import ServerConnection
    from train.multifaceted.bench.batch_api import read_batch
    from train.multifaceted.bench.judging import PROMPT_VERSION
    from train.multifaceted.bench.pairwise import read_protocol, read_results
    from train.multifaceted.bench.protocol import protocol_of, refuse_other_protocol, settings_of

    async def look(server: "Server") -> None:
        await ServerConnection(server, Backoff(), patience=0).api.close()

    with replace_in_errors(server_options("judge-")):
        for server in _judge_servers(options):
            asyncio.run(look(server))
    read_batch(options.batch_in)
    if options.against:
        theirs = protocol_of(read_protocol(options.against, read_results(options.against)))
        ours = settings_of(_protocol(options), PROMPT_VERSION, None if options.responses else _decoding(options))
        refuse_other_protocol("this run", ours, f"--against {options.against}", theirs)


def _judge_servers(options: argparse.Namespace) -> "list[Server]":
    from train.llm.server import Server

    return [Server(url, options.judge_concurrency, options.judge_key_variable) for url in options.judge_server]


async def _contact_judge(options: argparse.Namespace) -> None:
    """Ask the judge's servers for a sign of life: the model's answers take hours, and would be for nothing."""
    from train.evaluation.models.options import server_options
    from train.llm.refusals import option_formatter
    from train.llm.startup_check import check_servers

    if options.judge_server:
        with replace_in_errors(server_options("judge-")):
            await check_servers(
                _judge_servers(options),
                options.judge,
                wait=options.wait_for_server,
                stages={"judge": _protocol(options).judge.decoding},
                format_setting=option_formatter(_JUDGES_OWN, "judge-"),
            )


def _given(options: argparse.Namespace, bench: "Bench") -> "list[list[Response]]":
    """The responses of a file."""
    from train.llm.reasoning.answer import format_advice, list_events, without_reasoning
    from train.multifaceted.bench.rows import read_responses
    from train.multifaceted.bench.scoring import Response

    given, strangers = read_responses(options.responses, bench.rows)
    if strangers:
        print(
            f"--responses: {format_count(strangers, 'line', 'belongs', 'belong')} to no row that is asked for",
            flush=True,
        )
    found = []
    events: Counter[str] = Counter()
    for row in bench.rows:
        answers = given.get(row.id)
        if answers is None or not answers.texts:
            found.append([Response(None, "no line in --responses")])
            continue
        if len(answers.texts) > options.best_of and options.best_of == 1:
            raise UserError(
                f"--responses {options.responses}: row {row.id!r} has {len(answers.texts)} responses. Say "
                f"--best-of {len(answers.texts)}, or leave one in."
            )
        if options.best_of > 1 and options.pick_by == "file" and answers.scores is None:
            raise UserError(f"--pick-by file: row {row.id!r} of {options.responses} has no `scores`.")
        scores: Sequence[float | None] = answers.scores or [None] * len(answers.texts)
        said = [without_reasoning(text) for text in answers.texts[: options.best_of]]
        events.update(f"--responses: {event}" for one in said for event in list_events(one))
        found.append(
            [
                Response(one.text, scorer=score, only_reasoning=one.unfinished)
                for one, score in zip(said, scores[: options.best_of], strict=True)
            ]
        )
    for line in format_advice(events):
        print(f"warning: {line}", flush=True)
    return found


def _asked(options: argparse.Namespace, bench: "Bench", folder: Path) -> "tuple[list[list[Response]], str]":
    """The responses of a model, and the option to change where its server refused some."""
    from train.evaluation.models.options import respondent_of
    from train.evaluation.models.responses import generate_answers
    from train.llm.client import RequestFailed
    from train.llm.refusals import option_formatter
    from train.multifaceted.bench.scoring import Response, conversation

    answers = generate_answers(
        respondent_of(options),
        [conversation(row, with_system=not options.no_system) for row in bench.rows],
        _decoding(options),
        folder / JOURNAL,
        samples=options.best_of,
        stage="bench response",
        description="responses",
        wait_for_server=options.wait_for_server,
        before_asking=partial(_contact_judge, options),
        format_setting=option_formatter(_OWN),
    )
    failures = [answer for of_row in answers for answer in of_row if isinstance(answer, RequestFailed)]
    responses = [
        [
            Response(None, str(answer))
            if isinstance(answer, RequestFailed)
            else Response(
                answer.text,
                finish_reason=answer.finish_reason,
                only_reasoning=answer.only_reasoning,
                refused=answer.refused,
            )
            for answer in of_row
        ]
        for of_row in answers
    ]
    return responses, next((failure.advice for failure in failures if failure.advice), "")


def _decoding(options: argparse.Namespace) -> Any:
    from train.llm.journal import Decoding

    extra = {"repetition_penalty": None if options.repetition_penalty == 1 else options.repetition_penalty}
    return Decoding.from_settings(options.max_tokens, options.temperature, options.top_p, extra=extra | options.extra)


def _protocol(options: argparse.Namespace) -> "Protocol":
    from train.llm.journal import Decoding
    from train.multifaceted.bench.protocol import JudgeSettings, Protocol

    decoding = Decoding.from_settings(
        options.judge_max_tokens, options.judge_temperature, options.judge_top_p, extra=options.judge_extra
    )
    settings = JudgeSettings(options.judge, decoding, options.runs, options.retries, options.show_system)
    return Protocol(settings, options.best_of, options.pick_by.replace("-", " "))


def _judge(
    options: argparse.Namespace, bench: "Bench", responses: "list[list[Response]]", folder: Path
) -> "tuple[list[JudgedRow], str]":
    """Return the judgements, from servers or batch files, and the option to change where requests were refused."""
    from train.evaluation.models.options import server_options
    from train.llm.client import Client
    from train.llm.journal import Journal
    from train.llm.refusals import option_formatter
    from train.multifaceted.bench.batch_api import BatchJudgeClient, read_batch, write_batch
    from train.multifaceted.bench.scoring import judge_rows

    protocol = _protocol(options)
    format_setting = option_formatter(_JUDGES_OWN, "judge-")

    async def live(journal: Journal) -> "tuple[list[JudgedRow], str]":
        async with Client(
            _judge_servers(options),
            options.judge,
            journal,
            wait_for_server=options.wait_for_server,
            format_setting=format_setting,
        ) as client:
            judged = await judge_rows(client, protocol, bench.rows, responses)
        for line in client.counts.bad_servers:
            print(f"warning: {line}", flush=True)
        return judged, client.counts.advice

    batch = read_batch(options.batch_in)
    with Journal(folder / JOURNAL) as journal:
        if options.judge_server:
            with replace_in_errors(server_options("judge-")):
                return asyncio.run(live(journal))
        asker = BatchJudgeClient(journal, options.judge, batch, format_setting)
        judged = asyncio.run(judge_rows(asker, protocol, bench.rows, responses))
    if batch.lines:
        print(f"--batch-in: {format_count(batch.lines, 'line')}, {len(batch.answers):,} with an answer", flush=True)
        for what, count in batch.failed.most_common(5):
            print(f"--batch-in: {count:,} failed, and are asked for again: {what}", flush=True)
        if strangers := len(batch.answers.keys() - asker.found):
            to_none = f"{format_count(strangers, 'answer', 'is', 'are')} to none of these questions"
            print(f"--batch-in: {to_none} (other rows, responses or judge?)")
    wanted = len(asker.wanted)
    if wanted and options.batch_out:
        files = write_batch(asker.wanted, options.judge, options.batch_out)
        print(f"{format_count(wanted, 'question')} for the judge: {', '.join(map(str, files))}")
    elif wanted:
        have = format_count(wanted, "question", "has", "have")
        print(f"{have} no answer yet: --batch-out FILE writes what is missing, for the next batch")
    elif options.batch_out:
        print("the judge has answered everything: --batch-out wrote nothing")
    if asker.advice:
        print(f"--batch-in: {asker.advice}")
    return judged, asker.advice


def _write(options: argparse.Namespace, bench: "Bench", judged: "list[JudgedRow]", folder: Path) -> None:
    """bench_rows.jsonl, bench.json, bench.png and the section of report.md, and the same on the screen."""
    from train.multifaceted.bench.pairwise import compare_pairwise
    from train.multifaceted.bench.protocol import noted_of, protocol_of
    from train.multifaceted.bench.report import HEADING, draw, make_record, markdown, no_judgement_finished, warnings
    from train.multifaceted.bench.scoring import row_record

    record = make_record(
        options.model,
        bench,
        judged,
        _protocol(options),
        decoding=None if options.responses else _decoding(options),
        with_system=None if options.responses else not options.no_system,
        data=options.data,
        respondent={name: getattr(options, name) for name in ("template", "system_role", "engine", "dtype")},
        seed=options.seed,
    )
    rows = folder / "bench_rows.jsonl"
    versus = no_comparison = None
    try:
        if options.against and options.against.exists() and rows.exists() and options.against.samefile(rows):
            raise UserError(f"--against {options.against}: that is the file which this very command writes.")
        with atomic_write(rows) as [lines]:
            kept = protocol_of(record) | noted_of(record)
            records = (row_record(one, kept) for one in judged)
            write_text(lines, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
        if options.against and not record["complete"] and record["score"]["mean"] is None:
            print(f"--against {options.against}: compared once the judge has answered", flush=True)
        elif options.against:
            try:
                versus = compare_pairwise(rows, options.against, good=options.good, seed=options.seed)
                record["against"] = versus.record()
            except UserError as fault:  # said last: the run's own figures are none the worse
                no_comparison = fault
        scored = record["score"]["mean"] is not None
        with atomic_write(folder / "bench.json", *[folder / "bench.png"] * scored) as [figures, *plots]:
            write_text(figures, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            for plot in plots:
                draw(record, plot)
        if not scored:
            (folder / "bench.png").unlink(missing_ok=True)  # of an earlier run
        text = markdown(record, judged, batch=not options.judge_server)
        if versus:
            text += f"\nAgainst {options.against}:\n\n{versus.markdown()}"
        replace_section(folder / "report.md", HEADING, text)
    except OSError as fault:
        raise UserError(f"{folder}: can't be written: {fault.strerror}") from fault
    print(text)
    print(f"the figures are in {folder / 'bench.json'}, all answers and judgements in {rows}")
    if refusal := no_judgement_finished(record):
        raise UserError(refusal)
    for warning in warnings(record, batch=not options.judge_server):
        print(f"warning: {warning}")
    if no_comparison:
        raise no_comparison
