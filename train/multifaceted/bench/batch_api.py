"""OpenAI's batch API through files: the judge's requests in one file, its answers in others, up to a day later.

The `custom_id` of a request is its key in the journal. Answers therefore match their request in any order and from any
number of files, and a journal filled from them equals one filled by a server. Nothing is uploaded from here.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.llm.failures import RequestFailed
from train.llm.journal import Journal
from train.llm.judgement import PendingError
from train.llm.refusals import SettingFormatter, extract_error_text, format_config_key, suggest_setting
from train.llm.replies import UnusableReplyError, describe_empty, parse_completion
from train.llm.request import Answer, Request
from train.llm.request_body import request_body
from train.llm.server_errors import ErrorBody, classify_error, parse_error
from train.storage.atomic_write import atomic_write

URL = "/v1/chat/completions"
MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000
"""OpenAI's limits of one file (platform.openai.com/docs/guides/batch)."""


@dataclass(slots=True)
class BatchAnswers:
    """Contents of a batch's output and error files, by key.

    - `errors`: why a request will get no answer; `refusals`: the error objects of these.
    - `failed`: counts of errors that are not about a request itself (an API key, a model's name, a rate limit, the
      server's own error, an empty answer or one that the server broke off, an expired batch). Such requests are asked
      again.
    """

    answers: dict[bytes, Answer] = field(default_factory=dict)
    errors: dict[bytes, str] = field(default_factory=dict)
    refusals: dict[bytes, Any] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)
    lines: int = 0


def read_batch(paths: Sequence[str | Path]) -> BatchAnswers:
    """Read output files and error files. An answer takes precedence over an error of another file. Raises UserError."""
    batch = BatchAnswers()
    for path in paths:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"--batch-in {path}: cannot be read: {error.strerror}.") from error
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                key = bytes.fromhex(record["custom_id"])
                response, error_object = record.get("response"), record.get("error")
                if response is None and error_object is None:
                    raise KeyError("response")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"--batch-in {path}:{number}: that is no line of a batch's output or errors, or not of a batch "
                    "written by --batch-out. Such a line has `custom_id`, and `response` or `error`."
                ) from error
            batch.lines += 1
            _add_line(batch, key, response, error_object)
    for key in batch.answers:
        batch.errors.pop(key, None)
    return batch


def _add_line(batch: BatchAnswers, key: bytes, response: Any, error_object: Any) -> None:
    status = response.get("status_code") if isinstance(response, Mapping) else None
    body = response.get("body") if isinstance(response, Mapping) else None
    if status == 200:
        try:
            answer = parse_completion(body, seconds=0.0)
            if answer.empty:
                raise UnusableReplyError(describe_empty(answer))
        except UnusableReplyError as unusable:
            batch.failed[str(unusable)] += 1
            return
        except ValueError:
            pass  # an error in a 200, or an unknown body
        else:
            batch.answers.setdefault(key, answer)
            return
    error_body = (
        parse_error(body, json.dumps(body))
        or parse_error(error_object, json.dumps(error_object))
        or ErrorBody(None, "", "")
    )
    message = " ".join(error_body.message.split())[:300]
    with_status = f"{status}: {message}".removesuffix(": ")
    server_error = None
    if isinstance(status, int) and status >= 400:
        server_error = classify_error(status, message, error_body, {}, longest_wait=0.0)
    if server_error and server_error.kind == "request":
        batch.errors[key] = with_status
        batch.refusals[key] = (body.get("error") if isinstance(body, Mapping) else None) or error_object or body
    elif server_error and server_error.kind in ("denied", "fatal"):
        batch.failed[with_status] += 1
    else:
        batch.failed[message or f"status {status}"] += 1


class BatchJudgeClient:
    """A judge client that answers from the journal and from the files of a batch, which it adds to the journal.

    - `missing`: the requests without an answer in either, by key.
    - `matched`: the keys of the files' answers that were asked for.
    - `advice`: the setting to change for the first refused request, as a sentence that `format_setting` words.
    """

    def __init__(
        self, journal: Journal, model: str, batch: BatchAnswers, format_setting: SettingFormatter = format_config_key
    ) -> None:
        self.journal, self.model, self.batch = journal, model, batch
        self.format_setting, self.advice = format_setting, ""
        self.missing: dict[bytes, Request] = {}
        self.matched: set[bytes] = set()

    async def ask(self, request: Request) -> Answer:
        """Return the answer. Raises RequestFailed if the batch has an error for it, else PendingError."""
        key = request.key(self.model)
        if key in self.batch.answers:
            self.matched.add(key)
        if answer := self.journal.find(key, request.decoding.max_tokens):
            return answer
        if key in self.batch.errors:
            self.advice = self.advice or self._advice_on(self.batch.refusals[key], request)
            raise RequestFailed(self.batch.errors[key])
        if answer := self.batch.answers.get(key):
            await self.journal.add(key, self.model, request, answer)
            if stored := self.journal.find(key, request.decoding.max_tokens):
                return stored
        self.missing.setdefault(key, request)
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
    max_requests: int = MAX_REQUESTS,
    max_bytes: int = MAX_BYTES,
) -> list[Path]:
    """Write the requests to `path`, or to name-1, name-2, ... if they exceed the limits of one file; return the files.

    Raises UserError if one of the files exists: it may have been uploaded.
    """
    parts = list(_parts(requests, model, max_requests, max_bytes))
    names = [path] if len(parts) == 1 else [path.with_stem(f"{path.stem}-{number + 1}") for number in range(len(parts))]
    for name in (path, *names):
        if name.exists():
            raise UserError(f"--batch-out {name}: exists already. Name a new file, so that no request is sent twice.")
    try:
        with atomic_write(*names) as staged:
            for file, lines in zip(staged, parts, strict=True):
                file.write_bytes(b"".join(lines))
    except OSError as error:
        raise UserError(f"--batch-out {path}: cannot be written: {error.strerror}.") from error
    return names


def _parts(requests: Mapping[bytes, Request], model: str, max_requests: int, max_bytes: int) -> Iterator[list[bytes]]:
    """Yield the lines of each file."""
    lines: list[bytes] = []
    size = 0
    for key, request in requests.items():
        body = request_body(model, request)
        record = {"custom_id": key.hex(), "method": "POST", "url": URL, "body": body}
        line = json.dumps(record).encode() + b"\n"
        if lines and (len(lines) == max_requests or size + len(line) > max_bytes):
            yield lines
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield lines
