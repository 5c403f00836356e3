"""Control tokens that a server leaves in an answer are taken off, and so are the turns that a model made up."""

import pytest

from train.llm.journal import Answer
from train.llm.reasoning import advice_on, events_of, read_answer, without_reasoning


@pytest.mark.parametrize(
    ("end", "tokens"),
    [
        ("<|im_end|>", 1),
        ("<|im_end|>\n\n", 1),
        (" <|eot_id|><|end_of_text|>", 2),
        ("<end_of_turn>\n<eos>", 2),
        ("\n<end_of_turn>\n<end_of_turn>\n<end_of_turn>", 3),
        ("<｜end▁of▁sentence｜>", 1),
        ("<|endoftext|>", 1),
        ("<|end|>", 1),
        ("<|return|>", 1),
        ("<|endofturn|>", 1),
        ("[|endofturn|]", 1),
        ("<|END_OF_TURN_TOKEN|>", 1),
        ("<turn|>", 1),
        ("</s>", 1),
        (" [/INST]", 1),
        ("<seed:eos>", 1),
        ("<|im_end", 1),
        ("<unused106><unused106>", 2),
    ],
)
def test_control_tokens_at_the_end_are_taken_off(end: str, tokens: int) -> None:
    for before in ("", "<think>Hm.</think>\n\n"):
        found = without_reasoning(f"{before}Bern.{end}")
        assert (found.text, len(found.end_tokens), found.ran_on) == ("Bern.", tokens, False)
        assert not found.holds_control_tokens
        assert "control tokens taken off the end" in events_of(found)


@pytest.mark.parametrize(
    "rest",
    [
        "<|im_end|>\n<|im_start|>user\nAnd Geneva?<|im_end|>\n<|im_start|>assistant\nNo.",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd Geneva?",
        "<end_of_turn>\n<start_of_turn>user\nAnd Geneva?",
        "</s><s>[INST] And Geneva? [/INST] No.",
        "</s>\n<|user|>\nAnd Geneva?",
        "<｜User｜>And Geneva?",
        "<|endoftext|>Human: And Geneva?",
        "\n<|im_start|>user\nAnd Geneva?",
        "assistant\n\nBern it is.",
        "[|user|]And Geneva?",
        "</s>USER: And Geneva?",
        " [INST] And Geneva? [/INST]",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>And Geneva?",
    ],
)
def test_an_answer_ends_where_another_turn_begins(rest: str) -> None:
    found = without_reasoning(f"Bern.{rest}")
    assert (found.text, found.ran_on, found.unfinished) == ("Bern.", True, False)
    answer = Answer(f"Bern.{rest}", "length", None, 1, 1, 0.1)
    read, said = read_answer(answer)
    assert (read.text, read.cut) == ("Bern.", False)  # it came to its end before the limit
    assert "ran on after its end, and was cut there" in events_of(said)


@pytest.mark.parametrize(
    "text",
    [
        "ChatML ends a turn with <|im_end|> and begins one with <|im_start|>.",
        "The token `<|im_end|>` ends a turn.",
        "```\n<|im_start|>user\nHi<|im_end|>\n```",
        "Mistral wraps a question in [INST] and [/INST], and Zephyr writes <|user|> before it.",
        "It begins with <|im_start|>user and ends with <|im_end|>",
        "Sequences are <cls> ... <eos>, with the tokens that are registered.",
        "It was <s>wrong</s>",
        "HTML strikes text out with <s>",
        "A sentence ends with </s>",
        "Gemma's tokens: <eos>",
        "f <| x |> g",
        "See [1] and [2]",
        "<b>Bern</b>",
        "vector<vector<int>>",
    ],
)
def test_an_answer_that_speaks_of_tokens_stays(text: str) -> None:
    found = without_reasoning(text)
    assert (found.text, found.end_tokens, found.ran_on, found.unfinished) == (text, (), False, False)


def test_what_a_user_has_to_know_is_one_line_for_each_kind() -> None:
    events = {"generate: control tokens taken off the end": 3, "answer: control tokens taken off the end": 1_000}
    lines = advice_on({**events, "answer: reasoning taken out": 7, "new answer empty": 2})
    assert lines == [
        "control tokens taken off the end: 1,003 answers (generate 3, answer 1,000); the server does not know this "
        "model's end token: look at its chat template and its stop tokens"
    ]


def test_the_header_of_its_own_turn_is_taken_off() -> None:
    for header in ("<|im_start|>assistant\n", "<start_of_turn>model\n", "<|assistant|>\n", "<|START_RESPONSE|>"):
        assert without_reasoning(f"{header}Bern.").text == "Bern."


def test_an_answer_of_reasoning_alone_is_marked() -> None:
    read, said = read_answer(Answer("<think>Hm", "stop", None, 1, 1, 0.1))
    assert (read.text, read.only_reasoning) == ("", True)
    assert events_of(said) == ["reasoning without an end, and nothing said"]
    plain = Answer("Bern.", "stop", None, 1, 1, 0.1)
    assert read_answer(plain)[0] is plain
