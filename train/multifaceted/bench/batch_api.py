"""OpenAI's batch API through files: the judge's questions in one, its answers in others, with a day between them.

A request's `custom_id` is the key that the journal knows it by, so answers find their question in any order and from
any number of files, and a journal that has them is like one that was filled live. Nothing is uploaded from here.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.llm.failures import RequestFailed
from train.llm.journal import Answer, Journal, Request
from train.llm.refusals import SettingFormatter, extract_error_text, format_config_key, suggest_setting
from train.llm.replies import UnusableReplyError, describe_empty, parse_completion
from train.llm.request_body import request_body
from train.llm.server_errors import ErrorBody, classify_error, parse_error
from train.multifaceted.bench.judging import PendingError
from train.storage.atomic_write import atomic_write

URL = "/v1/chat/completions"
MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
"""What OpenAI takes in one file (platform.openai.com/docs/guides/batch)."""


@dataclass(slots=True)
class BatchAnswers:
    """What files of a batch's output hold, by key. `errors`: why a request will get no answer.

    `failed`: requests whose error is not about them (a key, a model's name, a limit, the server's own, an answer that
    is empty or that the server broke off, a batch that expired): they are to be asked again.
    """

    answers: dict[bytes, Answer] = field(default_factory=dict)
    errors: dict[bytes, str] = field(default_factory=dict)
    refusals: dict[bytes, Any] = field(default_factory=dict)
    """The error objects of `errors`."""
    failed: Counter[str] = field(default_factory=Counter)
    lines: int = 0


def read_batch(paths: Sequence[Path]) -> BatchAnswers:
    """The lines of output files and error files. An answer outdoes an error of another file. Raises UserError."""
    found = BatchAnswers()
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as fault:
            raise UserError(f"--batch-in {path}: can't be read: {fault.strerror}.") from fault
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                key = bytes.fromhex(record["custom_id"])
                response, error = record.get("response"), record.get("error")
                if response is None and error is None:
                    raise KeyError("response")
            except (ValueError, KeyError, TypeError, AttributeError) as fault:
                raise UserError(
                    f"--batch-in {path}:{number}: that is no line of a batch's output or errors, or not of a batch "
                    "written by --batch-out: one has `custom_id` and `response` or `error`."
                ) from fault
            found.lines += 1
            _take(found, key, response, error)
    for key in found.answers:
        found.errors.pop(key, None)
    return found


def _take(found: BatchAnswers, key: bytes, response: Any, error: Any) -> None:
    status = response.get("status_code") if isinstance(response, Mapping) else None
    body = response.get("body") if isinstance(response, Mapping) else None
    if status == 200:
        try:
            answer = parse_completion(body, seconds=0.0)
            if answer.empty:
                raise UnusableReplyError(describe_empty(answer))
        except UnusableReplyError as unusable:
            found.failed[str(unusable)] += 1
            return
        except ValueError:
            pass  # an error in a 200, or nothing known
        else:
            found.answers.setdefault(key, answer)
            return
    said = parse_error(body, json.dumps(body)) or parse_error(error, json.dumps(error)) or ErrorBody(None, "", "")
    what = " ".join(said.words.split())[:300]
    with_status = f"{status}: {what}".removesuffix(": ")
    trouble = isinstance(status, int) and status >= 400 and classify_error(status, what, said, {}, longest_wait=0.0)
    if trouble and trouble.kind == "row":
        found.errors[key] = with_status
        found.refusals[key] = (body.get("error") if isinstance(body, Mapping) else None) or error or body
    elif trouble and trouble.kind in ("denied", "hopeless"):
        found.failed[with_status] += 1
    else:
        found.failed[what or f"status {status}"] += 1


class BatchJudgeClient:
    """Asks the journal, into which it puts what a batch's files hold. `wanted`: what neither had, by key.

    `found`: the keys of the files' answers that were asked for. `advice`: the setting that the first refused request
    was about, as a sentence in the words of `format_setting`.
    """

    def __init__(
        self, journal: Journal, model: str, batch: BatchAnswers, format_setting: SettingFormatter = format_config_key
    ) -> None:
        self.journal, self.model, self.batch = journal, model, batch
        self.format_setting, self.advice = format_setting, ""
        self.wanted: dict[bytes, Request] = {}
        self.found: set[bytes] = set()

    async def ask(self, request: Request) -> Answer:
        """The answer in the journal. Raises RequestFailed where the batch says so, else NotYetError."""
        key = request.key(self.model)
        if key in self.batch.answers:
            self.found.add(key)
        if answer := self.journal.find(key, request.decoding.max_tokens):
            return answer
        if key in self.batch.errors:
            self.advice = self.advice or self._advice_on(self.batch.refusals[key], request)
            raise RequestFailed(self.batch.errors[key])
        if answer := self.batch.answers.get(key):
            await self.journal.add(key, self.model, request, answer)
            if found := self.journal.find(key, request.decoding.max_tokens):
                return found
        self.wanted.setdefault(key, request)
        raise PendingError

    def _advice_on(self, error: Any, request: Request) -> str:
        body = request_body(self.model, request)
        advice = suggest_setting(error, extract_error_text(error, ""), body, request.stage, self.format_setting)
        return f"{advice} Then write the batch again, without the file of these errors." if advice else ""


def write_batch(
    requests: Mapping[bytes, Request],
    model: str,
    path: Path,
    *,
    most_requests: int = MOST_REQUESTS,
    most_bytes: int = MOST_BYTES,
) -> list[Path]:
    """Write the requests to `path`, or where they are too many for one file to name-1, name-2 and so on.

    Returns the files. Raises UserError where one is there already: it may be one that was uploaded.
    """
    parts = list(_parts(requests, model, most_requests, most_bytes))
    names = [path] if len(parts) == 1 else [path.with_stem(f"{path.stem}-{number + 1}") for number in range(len(parts))]
    for name in (path, *names):
        if name.exists():
            raise UserError(f"--batch-out {name}: is there already. Name a new file, so that none is sent twice.")
    try:
        with atomic_write(*names) as asides:
            for aside, lines in zip(asides, parts, strict=True):
                aside.write_bytes(b"".join(lines))
    except OSError as fault:
        raise UserError(f"--batch-out {path}: can't be written: {fault.strerror}.") from fault
    return names


def _parts(requests: Mapping[bytes, Request], model: str, most_requests: int, most_bytes: int) -> Iterator[list[bytes]]:
    lines: list[bytes] = []
    size = 0
    for key, request in requests.items():
        body = request_body(model, request)
        record = {"custom_id": key.hex(), "method": "POST", "url": URL, "body": body}
        line = json.dumps(record).encode() + b"\n"
        if lines and (len(lines) == most_requests or size + len(line) > most_bytes):
            yield lines
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield lines
