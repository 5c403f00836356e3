"""Requests of a pipeline's stages: decoding settings, cleaned replies, usage and events per row."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from train.datagen.config import GenerationConfig
from train.datagen.stop_patterns import INVENTED_TURN, StopPattern, cut_at_stop_pattern
from train.datagen.usage import Usage
from train.llm.client import Client
from train.llm.failures import EmptyAnswerError
from train.llm.finish_reasons import BELOW_LIMIT, describe_unfinished
from train.llm.reasoning import list_events, read_answer
from train.llm.request import Answer, Request
from train.llm.system_role import merge_into_user


class RowInProgress(Protocol):
    """A row on its way through the stages. `usage`: by stage; `events`: counts under the report's labels."""

    usage: dict[str, Usage]
    events: Counter[str]


class StageClient:
    """Client of a pipeline: builds the requests of its stages and returns cleaned answers.

    `stop_patterns`: by stage; replies of other stages are kept complete.
    """

    def __init__(self, client: Client, config: GenerationConfig, stop_patterns: Mapping[str, StopPattern]) -> None:
        self._client, self._config, self._stop_patterns = client, config, stop_patterns

    def request(self, stage: str, messages: Sequence[Mapping[str, Any]], sample: int = 0) -> Request:
        """Build a request with the decoding settings of its stage. `sample`: number of the try, from 0."""
        if self._config.system_role == "merge_into_user":
            messages = merge_into_user(messages)
        return Request(stage, messages, self._config.stage(stage).decoding(), sample)

    async def ask(
        self,
        request: Request,
        row: RowInProgress,
        *,
        next_try: Request | None = None,
        continues_if_empty: bool = False,
    ) -> Answer:
        """Return the answer without reasoning, control tokens and invented turns. An empty answer is returned too.

        Args:
            request: the request.
            row: gets usage and events (reasoning, control tokens, unknown finish reasons, invented turns).
            next_try, continues_if_empty: see `Client.ask`.

        Raises RequestFailed and UserError as `Client.ask` does.
        """
        stage, events = request.stage, row.events
        try:
            answer = await self._client.ask(request, next_try=next_try, continues_if_empty=continues_if_empty)
        except EmptyAnswerError as failure:
            answer = failure.answer
        row.usage.setdefault(stage, Usage()).add(answer)
        if answer.finish_reason == BELOW_LIMIT:
            events[f"{stage}: answer without a finish_reason, below the token limit"] += 1
        elif answer.finish_class in ("unknown", "unstated"):
            events[f"{stage}: answer {describe_unfinished(answer.finish_reason)}"] += 1
        # In other stages the conversation is quoted in our prompt, so it can't ask for control tokens or tags.
        answer, reply = read_answer(answer, request.messages if stage == "answer" else ())
        for event in list_events(reply):
            events[f"{stage}: {event}"] += 1
        pattern = self._stop_patterns.get(stage)
        if pattern is not None and (text := cut_at_stop_pattern(answer.text, pattern)) != answer.text:
            events[f"{stage}: {INVENTED_TURN}"] += 1
            answer = replace(answer, text=text, finish_reason="stop" if answer.cut else answer.finish_reason)
        return answer
