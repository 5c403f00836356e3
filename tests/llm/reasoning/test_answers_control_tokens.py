"""Removal of control tokens around an answer, and of invented turns after it."""

import pytest

from train.llm.reasoning import format_advice, list_events, read_answer, without_reasoning
from train.llm.request import Answer


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
def test_control_tokens_at_the_end_are_removed(end: str, tokens: int) -> None:
    for before in ("", "<think>Hm.</think>\n\n"):
        reply = without_reasoning(f"{before}Bern.{end}")
        assert (reply.text, len(reply.end_tokens), reply.ran_on) == ("Bern.", tokens, False)
        assert not reply.holds_control_tokens
        assert "control tokens taken off the end" in list_events(reply)


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
    reply = without_reasoning(f"Bern.{rest}")
    assert (reply.text, reply.ran_on, reply.unfinished) == ("Bern.", True, False)
    answer = Answer(f"Bern.{rest}", "length", None, 1, 1, 0.1)
    read, reply = read_answer(answer)
    assert (read.text, read.cut) == ("Bern.", False)  # it was complete before the limit
    assert "ran on after its end, and was cut there" in list_events(reply)


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
    reply = without_reasoning(text)
    assert (reply.text, reply.end_tokens, reply.ran_on, reply.unfinished) == (text, (), False, False)


@pytest.mark.parametrize(
    "text",
    [
        "**<|endoftext|>** is the token that ends a document.",
        "<|endoftext|> is the token that ends a document.",
        "Two tokens:\n\n1. <|im_start|> opens.\n2. <|im_end|> closes.\n\nUse both.",
        "The prompt format is:\n\n[INST] your question [/INST]\n\nThe model answers after it.",
        "The format is:\n\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\nThen the model writes.",
        "The format is:\n\n~~~\n<|im_start|>user\nHi<|im_end|>\n~~~\n\nThen the model writes.",
        "The format is:\n\n````\n```text\n<|im_start|>user\nHi<|im_end|>\n```\n````\n\nThen it writes.",
        "The format is:\n\n    <|im_start|>user\n    Hi<|im_end|>\n    <|im_start|>assistant\n\nThen it writes.",
        "Write <code><|im_end|></code> at the end, and <pre>\n<|im_start|>user\n</pre> before.",
        "Strike it like this: <s>old price</s>\nThen add <s>and strike</s> the new.",
        "The mean speed is written as <|v|>",
        "let h = f <|g|>",
        "g <|h|>",
        "The end token of ChatML is:\n\n<|im_end|>",
        "The end token of ChatML is <|im_end|>",
        "A: <|im_end|>",
        "The special tokens are:\n\n<pad>\n<unk>\n<bos>\n<eos>",
        "The special tokens are:\n\n- <|im_start|>\n- <|im_end|>",
        "The special tokens are\n\n1. <bos>\n2. <eos>",
        "<s>99 francs</s> 79 francs",
        "<s> is the token that begins a text in Llama 2.",
        "[/INST] closes the question.",
        "<bos>, <eos> and <pad> are tokens.",
        "Bern.<|im_end|>\nAnd it lies on the Aare.",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo",
    ],
)
def test_tokens_that_may_be_content_stay_and_are_counted(text: str) -> None:
    read, reply = read_answer(Answer(text, "stop", None, 1, 1, 0.1))
    assert (read.text, reply.end_tokens, reply.ran_on, reply.unfinished) == (text, (), False, False)
    assert "control tokens left in the text" in list_events(reply)


@pytest.mark.parametrize(
    "text",
    [
        "<s> Bern.</s>",
        "<|begin_of_text|>Bern.",
        "<bos>Bern.<eos>",
        " [/INST] Bern.",
        "<|begin_of_box|>Bern.<|end_of_box|>",
        "<｜begin▁of▁sentence｜>Bern.<｜end▁of▁sentence｜>",
        "Bern.[e~[",
        "]~b]ai\nBern.[e~[",
        "<|bom|><|assistant|> Bern.<|eom|>",
        "<|startoftext|><|im_start|>assistant\nBern.<|im_end|>",
        "[gMASK]<sop><|assistant|>\nBern.<|user|>",
        "<s><think>Hm.</think>Bern.</s>",
        "Bern.<|im_end|>\n<|im_start|>",
        "Bern.<|endoftext|><|endoftext|>\n",
    ],
)
def test_tokens_around_an_answer_are_removed(text: str) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.unfinished, reply.holds_control_tokens) == ("Bern.", False, False)


def test_a_space_may_precede_the_end_of_a_turn() -> None:
    reply = without_reasoning("It is Bern <|im_end|>\n<|im_start|>user\nMore?")
    assert (reply.text, reply.ran_on) == ("It is Bern", True)


def test_a_turn_after_code_is_cut_off() -> None:
    for end in ("<|im_end|>\n", "\n<|im_end|>\n", "\n"):
        reply = without_reasoning(f"Here:\n```python\nx\n```{end}<|im_start|>user\nMore?")
        assert (reply.text, reply.ran_on) == ("Here:\n```python\nx\n```", True)


@pytest.mark.parametrize("text", ["<|im_end|>", "<s></s>", "<|eot_id|>\n", "<|im_start|>assistant\n<|im_end|>"])
def test_nothing_but_tokens_is_an_empty_answer(text: str) -> None:
    read, reply = read_answer(Answer(text, "stop", None, 1, 1, 0.1))
    assert (read.text, read.empty, reply.unfinished) == ("", True, False)


@pytest.mark.parametrize(
    "text",
    [
        "Bern.\n\nHuman: And of France?\n\nAssistant: Paris.",
        "Bern.\nuser\nAnd of France?\nassistant\nParis.",
        "- Basel\n- Baselassistant\n\nBern.",
        "Bern.\n\n### User:\nAnd of France?\n\n### Assistant:\nParis.",
        "Bern.\n\nUSER: And of France?\nASSISTANT: Paris.",
    ],
)
def test_turns_without_tokens_stay_and_are_counted(text: str) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.ran_on) == (text, False)
    assert "lines that look like further turns" in list_events(reply)


@pytest.mark.parametrize("before", ["(Bern)", '"Bern"', "**Bern**", "Bern。", "[Bern]"])
def test_a_turn_of_llama_3_begins_after_any_end_of_a_sentence(before: str) -> None:
    reply = without_reasoning(f"{before}assistant\n\nBern it is.")
    assert (reply.text, reply.ran_on) == (before, True)


@pytest.mark.parametrize("text", ["Ask the assistant.", "Jobs:\n- Laborant\n- Assistant: helps", "An AI: a machine."])
def test_ordinary_lines_are_no_turns(text: str) -> None:
    assert list_events(without_reasoning(text)) == []


def test_advice_is_one_line_for_each_kind_of_event() -> None:
    events = {"generate: control tokens taken off the end": 3, "answer: control tokens taken off the end": 1_000}
    lines = format_advice({**events, "answer: reasoning taken out": 7, "new answer empty": 2})
    assert lines == [
        "control tokens taken off the end: 1,003 answers (generate 3, answer 1,000); the server does not know this "
        "model's end token: look at its chat template and its stop tokens"
    ]


def test_the_header_of_the_answers_own_turn_is_removed() -> None:
    for header in ("<|im_start|>assistant\n", "<start_of_turn>model\n", "<|assistant|>\n", "<|START_RESPONSE|>"):
        assert without_reasoning(f"{header}Bern.").text == "Bern."


def test_an_answer_of_only_reasoning_is_marked() -> None:
    read, reply = read_answer(Answer("<think>Hm", "stop", None, 1, 1, 0.1))
    assert (read.text, read.only_reasoning) == ("", True)
    assert list_events(reply) == ["reasoning without an end, and nothing said"]
    plain = Answer("Bern.", "stop", None, 1, 1, 0.1)
    assert read_answer(plain)[0] is plain
