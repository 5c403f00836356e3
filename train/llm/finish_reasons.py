"""Finish reasons of all servers, and the class of each.

    complete   the model ended its answer, or a stop string did
    cut        the token limit or the context window ended it
    refused    a filter or the model withheld it, or a part of it
    tool       the model called a tool; requests offer none, so this is no answer in text
    error      the server broke it off; it is asked again, like a 500
    unknown    a reason that is not in the table, or one without meaning ("other")
    unstated   the server gave no reason

The OpenAI API has five reasons; servers and gateways have more, and pass on those of the model's own API. Case and
punctuation are ignored: MAX_TOKENS, maxTokens and max_tokens are the same, and so are content_filter and
content-filter. In `content_filter: PROHIBITED_CONTENT` or `FinishReason.STOP` the part in the table decides.
"""

import functools
from typing import Literal

FinishClass = Literal["complete", "cut", "refused", "tool", "error", "unknown", "unstated"]

BELOW_LIMIT = "missing, below the token limit"
"""Our own reason for an answer without one that is shorter than the token limit, and so was not cut."""

INFERRED = ("", "null", "none", BELOW_LIMIT, "length", "tool_calls")
"""Finish reasons that we may have inferred for an answer without one."""

REASONS: dict[FinishClass, str] = {
    # OpenAI, vLLM, SGLang: stop. TGI, Together: eos, eos_token. llama.cpp before 2024: eos, word. Anthropic, Bedrock:
    # end_turn, stop_sequence. Cohere: COMPLETE. Titan: FINISH. ERNIE: normal.
    "complete": "stop eos eos_token end_turn end_of_turn end_of_text endoftext stop_sequence stop_string "
    "stop_token stop_word word complete completed finish finished normal done end",
    # Gemini: MAX_TOKENS. Mistral: model_length. Anthropic, GLM: model_context_window_exceeded. Cohere: ERROR_LIMIT.
    # watsonx: token_limit. OpenAI's Responses: max_output_tokens. llama.cpp: limit.
    "cut": "length max_tokens max_token max_length max_output_tokens max_completion_tokens max_new_tokens model_length "
    "max_model_len context_length context_length_exceeded context_window_exceeded model_context_window_exceeded "
    "token_limit token_limit_reached limit error_limit truncated incomplete",
    # Azure, OpenAI: content_filter. Anthropic: refusal. Bedrock: guardrail_intervened, content_filtered. Gemini: the
    # upper-case ones, which its OpenAI endpoint passes on. GLM, Hunyuan: sensitive. Cohere: ERROR_TOXIC.
    "refused": "content_filter content_filtered content_filtering content_policy content_policy_violation filtered "
    "refusal refused safety recitation prohibited_content blocklist spii model_armor language escalation blocked "
    "image_safety image_prohibited_content image_recitation guardrail guardrails guardrail_intervened moderation "
    "sensitive error_toxic policy_violation blocked_reason_unspecified",
    # Anthropic, Bedrock: tool_use. Gemini: MALFORMED_FUNCTION_CALL and the like.
    "tool": "tool_calls tool_call tool_use function_call function_calls malformed_function_call malformed_tool_use "
    "malformed_tool_call unexpected_tool_call too_many_tool_calls",
    # vLLM, SGLang: abort, error. OpenRouter, Mistral, Cohere: error. Ollama: load, unload. DeepSeek:
    # insufficient_system_resource. GLM: network_error. TensorRT-LLM, watsonx: cancelled, timeout, time_limit,
    # not_finished. Gemini: MALFORMED_RESPONSE. Bedrock: malformed_model_output.
    "error": "abort aborted error errored exception failed failure cancel canceled cancelled user_cancel load loading "
    "unload timeout timed_out time_limit deadline_exceeded insufficient_system_resource insufficient_resources "
    "overloaded rate_limit rate_limited network_error server_error internal_error internal_server_error "
    "service_unavailable unavailable engine_error connection_error upstream_error provider_error error_other "
    "not_finished unfinished in_progress interrupted preempted shutdown disconnect disconnected malformed_response "
    "malformed_model_output missing_thought_signature",
    # Sent by servers without a reason.
    "unstated": "null none",
}  # fmt: skip


_DESCRIPTIONS: dict[FinishClass, str] = {
    "complete": "",
    "cut": "cut at the token limit",
    "refused": "refused",
    "tool": "calls a tool",
    "error": "broken off by the server ({})",
    "unknown": "ended for an unknown reason ({})",
    "unstated": "without a finish_reason",
}


def _plain(reason: str) -> str:
    return "".join(filter(str.isalnum, reason.casefold()))


_CLASSES = {_plain(name): finish_class for finish_class, names in REASONS.items() for name in names.split()}
_CLASSES[_plain(BELOW_LIMIT)] = "complete"


@functools.lru_cache(maxsize=1024)
def classify_finish_reason(finish_reason: str) -> FinishClass:
    """Return the class of a finish reason; unstated for an empty one."""
    if not (plain := _plain(finish_reason)):
        return "unstated"
    if finish_class := _CLASSES.get(plain):
        return finish_class
    # `content_filter: PROHIBITED_CONTENT`, `stop: max_tokens`: the part that is not `complete` counts.
    for part in finish_reason.split(":"):
        if (finish_class := _CLASSES.get(_plain(part))) not in (None, "complete"):
            return finish_class
    # `FinishReason.STOP`, `FINISH_REASON_MAX_TOKENS`
    last = finish_reason.rpartition(".")[2]
    return _CLASSES.get(_plain(last)) or _CLASSES.get(plain.removeprefix("finishreason")) or "unknown"


def describe_unfinished(finish_reason: str) -> str:
    """Return the reports' text for an answer that is not complete; empty for one that is."""
    return _DESCRIPTIONS[classify_finish_reason(finish_reason)].format(finish_reason[:60])
