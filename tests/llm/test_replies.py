"""The answer in a chat completion: the class of its finish reason, and the forms of its content."""

from typing import Any

import pytest

from train.llm.finish_reasons import REASONS, FinishClass, classify_finish_reason
from train.llm.replies import UnusableReplyError, describe_empty, parse_completion
from train.llm.request import Answer

ENDINGS: list[tuple[FinishClass, str]] = [
    ("complete", "stop STOP eos eos_token EOS end_turn stop_sequence COMPLETE Stop FinishReason.STOP endTurn"),
    ("cut", "length LENGTH max_tokens MAX_TOKENS maxTokens model_length model_context_window_exceeded token_limit"),
    ("cut", "max_output_tokens FINISH_REASON_MAX_TOKENS FinishReason.MAX_TOKENS ERROR_LIMIT"),
    ("refused", "content_filter content-filter content_filtered SAFETY RECITATION PROHIBITED_CONTENT BLOCKLIST SPII"),
    ("refused", "refusal guardrail_intervened content_filter:PROHIBITED_CONTENT sensitive ERROR_TOXIC Content_Filter"),
    ("tool", "tool_calls function_call tool_use MALFORMED_FUNCTION_CALL toolUse"),
    ("error", "abort error ERROR cancelled canceled load timeout insufficient_system_resource network_error"),
    ("cut", "stop:max_tokens Stop:length"),
    ("unknown", "stop:foo foo.bar"),
    ("error", "abort:engine-died not_finished unload MALFORMED_RESPONSE"),
    ("unknown", "foo OTHER FINISH_REASON_UNSPECIFIED pause_turn stopped_by_foo 7 unlength"),
]


@pytest.mark.parametrize(("finish_class", "names"), ENDINGS)
def test_the_class_of_a_finish_reason(finish_class: FinishClass, names: str) -> None:
    assert {name: classify_finish_reason(name) for name in names.split()} == dict.fromkeys(names.split(), finish_class)


def test_case_and_punctuation_make_no_difference_and_no_reason_is_in_two_classes() -> None:
    for finish_class, names in REASONS.items():
        for name in names.split():
            parts = name.split("_")
            camel = parts[0] + "".join(map(str.capitalize, parts[1:]))
            for form in (name, name.upper(), "-".join(parts), camel, f" {name}. "):
                assert classify_finish_reason(form) == finish_class, form
    every = [name for names in REASONS.values() for name in names.split()]
    assert len(set(every)) == len(every)


def test_no_reason_is_unstated() -> None:
    assert {classify_finish_reason(name) for name in ("", " ", "null", "None", "-")} == {"unstated"}


def reply(message: Any = None, finish_reason: Any = "stop", **choice: Any) -> Answer:
    choice = {"index": 0, "finish_reason": finish_reason, **choice}
    if message is not None:
        choice["message"] = message
    return parse_completion({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}, 0.5)


def text_part(text: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": text}


THINKING = {"type": "thinking", "thinking": [text_part("Let me see.")]}

CONTENTS: dict[str, tuple[Any, str, str]] = {
    "a text": ("Hello.", "Hello.", ""),
    "Magistral's parts": ([THINKING, text_part("Hello.")], "Hello.", "content parts"),
    "two parts": ([text_part("Hel"), text_part("lo.", "output_text")], "Hello.", ""),
    "bare strings": (["Hel", "lo."], "Hello.", ""),
    "parts without a type": ([{"text": "Hello."}], "Hello.", ""),
    "one part alone": (text_part("Hello."), "Hello.", ""),
    "reasoning alone": ([{"type": "reasoning", "text": "Hm."}], "", "content parts"),
    "redacted reasoning": ([{"type": "redacted_thinking", "data": "x"}, text_part("Hello.")], "Hello.", "content parts"),
    "no parts": ([], "", ""),
}  # fmt: skip


@pytest.mark.parametrize(("content", "text", "reasoning_in"), CONTENTS.values(), ids=CONTENTS)
def test_the_text_in_content(content: Any, text: str, reasoning_in: str) -> None:
    answer = reply({"role": "assistant", "content": content})
    assert (answer.text, answer.reasoning_in, answer.refusal) == (text, reasoning_in, None)
    assert (answer.empty, answer.unfinished) == ((False, "") if text else (True, answer.unfinished))


def test_a_refusal_in_a_part_is_a_refusal() -> None:
    answer = reply({"content": [{"type": "refusal", "refusal": "I can't."}]})
    assert (answer.text, answer.refusal, answer.refused, answer.empty) == ("", "I can't.", True, False)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_an_unreadable_part_is_named(kind: str) -> None:
    with pytest.raises(UnusableReplyError, match=f"an unreadable part of type '{kind}'"):
        reply({"content": [THINKING, {"type": kind, kind: {}}]})


@pytest.mark.parametrize("kind", ["reference", "image_url", "web_search_call", "citations"])
def test_an_unreadable_part_beside_text_is_ignored(kind: str) -> None:
    answer = reply({"content": [text_part("Bern"), {"type": kind, "reference_ids": [1]}, text_part(".")]})
    assert (answer.text, answer.ignored_part, answer.unfinished) == ("Bern.", kind, "")
    assert reply({"content": [text_part("Bern.")]}).ignored_part == ""


def test_the_completions_form_and_several_choices() -> None:
    assert reply(text="Hello.").text == "Hello."
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"} for text in ("first", "second")]}
    assert parse_completion(body, 0.1).text == "first"


@pytest.mark.parametrize("body", [{}, [], {"choices": []}, {"choices": None}, {"choices": ["x"]}, {"choices": [7]}])
def test_other_bodies_are_no_completion(body: Any) -> None:
    with pytest.raises(ValueError, match="not a chat completion"):
        parse_completion(body, 0.1)


@pytest.mark.parametrize(
    ("choice", "parts"),
    [
        ({"finish_reason": "abort"}, r"broke the answer off \(finish_reason abort\)$"),
        ({"finish_reason": {"type": "abort", "message": "x"}}, r"\(finish_reason abort\)$"),
        ({"finish_reason": "stop", "error": {"code": 502, "message": "gone"}}, r"\(finish_reason stop\): 502: gone$"),
        ({"finish_reason": "error", "error": "upstream"}, r"\(finish_reason error\): upstream$"),
        ({"finish_reason": None, "error": {"status": 1}}, r"\(finish_reason missing\): \{'status': 1\}$"),
    ],
)
def test_an_answer_that_the_server_broke_off(choice: dict[str, Any], parts: str) -> None:
    with pytest.raises(UnusableReplyError, match=parts):
        reply({"content": "Water boils because its"}, **choice)


def test_a_native_refusal_overrides_a_gateways_error() -> None:
    answer = reply({"content": ""}, "error", native_finish_reason="PROHIBITED_CONTENT", error={"code": 403})
    assert (answer.refused, answer.finish_reason) == (True, "PROHIBITED_CONTENT")


@pytest.mark.parametrize(
    ("finish_reason", "native", "unfinished"),
    [
        ("stop", "MAX_TOKENS", "cut at the token limit"),
        ("stop", "length", "cut at the token limit"),
        ("stop", "SAFETY", "refused"),
        ("stop", "tool_use", "calls a tool"),
        ("OTHER", "max_tokens", "cut at the token limit"),
        (None, "max_tokens", "cut at the token limit"),
        (None, "end_turn", ""),
        ("stop", "STOP", ""),
        ("stop", "something new", ""),
        ("stop", None, ""),
        ("length", "stop", "cut at the token limit"),
        ("content_filter", "STOP", "refused"),
    ],
)
def test_the_worse_of_a_gateways_reason_and_the_models_counts(
    finish_reason: str | None, native: str | None, unfinished: str
) -> None:
    assert reply({"content": "Half"}, finish_reason, native_finish_reason=native).unfinished == unfinished
    fields = {"native_finish_reason": native}
    assert reply({"content": "Half"}, finish_reason, provider_specific_fields=fields).unfinished == unfinished


def test_a_native_error_is_an_error() -> None:
    with pytest.raises(UnusableReplyError, match=r"\(finish_reason abort\)$"):
        reply({"content": "Half"}, "stop", native_finish_reason="abort")


@pytest.mark.parametrize("choices", [{"choices": None}, {"choices": []}, {}])
@pytest.mark.parametrize(
    "feedback",
    [
        {"promptFeedback": {"blockReason": "SAFETY"}},
        {"promptFeedback": {"blockReason": "OTHER", "safetyRatings": []}},
        {"prompt_feedback": {"block_reason": "PROHIBITED_CONTENT"}},
    ],
)
def test_a_blocked_prompt_is_refused(choices: dict[str, Any], feedback: dict[str, Any]) -> None:
    answer = parse_completion({**choices, **feedback}, 0.1)
    assert (answer.refused, answer.empty, answer.unfinished) == (True, False, "refused")
    assert "content_filter: " in answer.detail
    body = {"choices": [{"message": {"content": "Bern."}, "finish_reason": "stop"}], "promptFeedback": {}}
    assert parse_completion(body, 0.1).unfinished == ""


@pytest.mark.parametrize("text", ["\u200b", "\ufeff", " \u2060\n", "\u00ad\u200d"])
def test_invisible_characters_are_no_answer(text: str) -> None:
    answer = reply({"content": text})
    assert (answer.empty, answer.unfinished) == (True, "empty")
    assert not reply({"content": f"{text}x"}).empty


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [{"id": "1"}]},
        {"content": "Let me look.", "function_call": {"name": "f"}},
        {"content": [{"type": "tool_use", "name": "f"}]},
    ],
)
@pytest.mark.parametrize("finish_reason", ["stop", "tool_calls", None])
def test_a_tool_call_is_no_text_answer(message: dict[str, Any], finish_reason: str | None) -> None:
    answer = reply(message, finish_reason)
    assert (answer.unfinished, answer.empty) == ("calls a tool", False)


FIELDS = ["reasoning_content", "reasoning", "reasoning_details", "thinking"]


@pytest.mark.parametrize("field", FIELDS)
def test_an_answer_only_in_a_reasoning_field_is_empty(field: str) -> None:
    value = [{"type": "reasoning.text", "text": "Hm."}] if field == "reasoning_details" else "Hello."
    answer = reply({"role": "assistant", "content": None, field: value, "tool_calls": []})
    assert (answer.text, answer.empty, answer.unfinished) == ("", True, f"empty, all of it in {field}")
    assert f"all of it in {field}" in describe_empty(answer)
    assert "enable_thinking" in describe_empty(answer)
    beside = reply({"content": "Hello.", field: value})
    assert (beside.text, beside.empty, beside.unfinished, beside.reasoning_in) == ("Hello.", False, "", field)
    cut = reply({"content": "", field: value}, "length")
    assert (cut.empty, cut.unfinished) == (False, "cut at the token limit")


@pytest.mark.parametrize(
    ("message", "finish_reason", "unfinished"),
    [
        ({}, "content_filter: PROHIBITED_CONTENT", "refused"),
        ({"content": "Half"}, "SAFETY", "refused"),
        ({"content": "Half"}, "MAX_TOKENS", "cut at the token limit"),
        ({"content": "Half", "refusal": "No."}, "length", "refused"),
        ({"content": "All?"}, "foo", "ended for an unknown reason (foo)"),
        ({"content": "All?"}, None, "without a finish_reason"),
        ({"content": " \n"}, "stop", "empty"),
    ],
)
def test_the_reason_that_an_answer_is_not_complete(message: Any, finish_reason: Any, unfinished: str) -> None:
    assert reply(message, finish_reason).unfinished == unfinished
