"""Marks of reasoning and control tokens that an answer mentions stay, and real ones next to code are found."""

import pytest

from train.llm.reasoning import list_events, read_answer, without_reasoning
from train.llm.request import Answer

THOUGHT = [
    "Okay, the user asks about the capital. I'd wrap it in ```json if asked.\n",
    "Okay, it is Bern. The text has a ` in it, never mind.",
    "They want me to use <reasoning> tags. Fine.\n",
    "They want me to put it in <think> tags. Fine.\n",
    "Maybe:\n```python\nprint(1)\nNo wait, no code.\n",
    "Maybe:\n~~~\nprint(1)\nNo wait, no code.\n",
    "Maybe:\n````markdown\n```\na\n```\nNo wait.\n",
    "Like ```\n",
    "It`s fine.",
    "It says `zip and `map.\n",
    "Should it be <code>ls? Yes.\n",
    "So the answer is this:\n",
]
SAID = [
    "Bern is the capital.",
    "Bern is `x`.",
    "Here it is:\n```python\nprint(1)\n```",
    "Here it is:\n```\nprint(1)\n```\nand\n~~~\nls\n~~~",
    "`ls` lists files.",
]


@pytest.mark.parametrize("thought", THOUGHT)
@pytest.mark.parametrize("answer", SAID)
def test_an_open_code_block_hides_no_closer(thought: str, answer: str) -> None:
    for opener in ("", "<think>\n"):
        reply = without_reasoning(f"{opener}{thought}</think>\n\n{answer}")
        assert (reply.text, reply.reasoning, reply.unfinished) == (answer, thought.strip(), False)


@pytest.mark.parametrize("thought", THOUGHT)
def test_a_backtick_on_the_line_of_the_answer_hides_no_closer(thought: str) -> None:
    for answer in SAID:
        assert without_reasoning(f"{thought}</think>{answer}").text == answer


def test_tags_in_reasoning_are_no_phrases() -> None:
    thought = "I need tags. The format is <<Role>>x<</Role>> in ``` maybe.\n"
    phrase = "<<Role>>You are a geography teacher.<</Role>>"
    assert without_reasoning(f"{thought}</think>\n\n{phrase}").text == phrase


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Sure!\n<think>\nOkay, the user wants Bern.\n</think>\nBern.", "Sure!\nBern."),
        ("Bern.\n\n<think>\nShould I add more? No.\n</think>\n\nIt is on the Aare.", "Bern.\n\nIt is on the Aare."),
        ("Bern is the capital.\n\n<think>\nThat will do.\n</think>", "Bern is the capital."),
        ("Sure!\n[THINK]\nOkay, Bern.\n[/THINK]\nBern.", "Sure!\nBern."),
        ("I'll answer now </think> The capital is Bern.", "The capital is Bern."),
        ("Bern, surely </think> So: Bern.", "So: Bern."),
        ("<think>What </think> does is end it.\n</think>\n\nBern.", "Bern."),
        ("<think>The user wrote </think> in it, and `</think>` too.</think>\nBern.", "Bern."),
        ("analysisWe need it.assistantfinalBern.assistantanalysisMore.assistantfinalBern again.", "Bern."),
        ("analysisWe need it.assistantfinalBern.assistantcommentaryHm", "Bern."),
        ("<think>abc</thinking>\n\nBern.", "Bern."),
        ("Hm.</think> and so it is Bern.", "and so it is Bern."),
        ("hm, ok\n</think>\nbern", "bern"),
        ("Okay.</think>\n\n</think>\n\nBern.", "Bern."),
        ("Run\n```\nls\n```</think>\n\nBern.", "Bern."),
        ("<thought>abc</think>\n\nBern.", "Bern."),
        ("[THINK]abc[/THINKING]\nBern.", "Bern."),
        ("<|START_THINKING|>Hm.</think>\n\nBern.", "Bern."),
    ],
)
def test_certain_reasoning_is_removed(text: str, answer: str) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.unfinished) == (answer, False)
    assert reply.reasoning is not None


@pytest.mark.parametrize(
    "text",
    [
        "Bern is the capital.\n\n<think>\nWait, should I add more? The user",
        "Sure!\n<think>\nOkay",
        "analysisHmm, Bern it is. Answer: Bern",
        "analysisOkay, Bern it is.",
        "analysis\nThe user asks for the capital.",
        "analysisQuestion: the capital. Answer: Bern",
    ],
)
def test_reasoning_without_a_certain_end_is_unfinished(text: str) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.unfinished) == ("", True)


@pytest.mark.parametrize(
    "text",
    [
        "<think>\n\n</think>\n\n",
        "<think>Bern is the capital.</think>",
        "◁think▷Bern.◁/think▷",
        "Bern is the capital.\n</think>",
        '<details type="reasoning" done="true">Bern.</details>',
    ],
)
def test_reasoning_with_nothing_after_it_is_an_empty_answer(text: str) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.unfinished) == ("", False)
    assert reply.reasoning in ("", "Bern.", "Bern is the capital.")


@pytest.mark.parametrize(
    "text",
    [
        "<think> is the tag that DeepSeek-R1 opens with. It closes it with </think> and then answers.",
        "<think> and </think> are the tags of R1.",
        "<think>, in R1, opens the reasoning.",
        "</think> is the tag that closes it.",
        "The closing tag is\n</think>\nso look for it.",
        "The closing tag is:\n\n</think>\n\nIt stands on its own line.",
        "It ends with </think>\nand then the answer comes.",
        "A text of R1 ends in\n</think>\nand the answer.",
        "The form of R1:\n\n<think>\nhm\n</think>\nBern.\n\nThat is all.",
        "The opening tag is:\n\n<think>\n\nIt stands first.",
        "<reflection>\nThis week I learnt to bake.\n</reflection>",
        "<scratchpad>\n2 + 2 = 4\n</scratchpad>",
        "<details><summary>Reasoning</summary>Because it is so.</details>",
        "<thinking>She doubted him.</thinking>\n<speech>Hello!</speech>",
        "Kimi-VL marks reasoning with ◁think▷ and ◁/think▷, each a token.",
        "Command A uses <|START_THINKING|> for it.",
        "Command A ends its reasoning with <|END_THINKING|>.",
        "BERT's vocabulary has [unused16] for you.",
        "Gemma reserves <unused94>",
        "[REASONING]: as follows",
        "analysis\nThe poem has four stanzas.",
        "commentary\nThe match begins.",
        "thought\nis the past tense of think.",
        "analysisResult is null, as it was never set.",
        "The format is:\n\n~~~\n<think>\nhm\n</think>\n~~~\n\nThen the answer.",
        "The format is:\n\n    <think>\n    hm\n    </think>\n\nThen the answer.",
        "The format is <code><think>hm</think></code> in R1.",
        "````\n```\n<think>\n```\nhm\n</think>\n````",
        "```\nhm\n</think>\n```\nand\n```\nls\n```",
    ],
)
def test_marks_that_may_be_content_stay_and_are_counted(text: str) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.reasoning, reply.unfinished, reply.ran_on) == (text, None, False, False)
    if "anal" not in text and "comm" not in text and "thought\n" not in text and "<details>" not in text:
        assert {"tags of reasoning left in the text", "control tokens left in the text"} & set(list_events(reply))


@pytest.mark.parametrize("text", ["gpt-oss uses the token <|start|>", "The token <|message|> begins the content."])
def test_an_answer_may_mention_a_token_of_the_channels(text: str) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.unfinished) == (text, False)
    assert "control tokens left in the text" in list_events(reply)


def test_tags_that_the_question_asks_for_are_no_reasoning() -> None:
    text = "<reasoning>2 + 2 is 4.</reasoning><answer>4</answer>"
    asked = [{"role": "user", "content": "Write <reasoning>...</reasoning> and then <answer>...</answer>: 2 + 2"}]
    assert without_reasoning(text).text == "4"
    assert without_reasoning(text, asked).text == text
    assert read_answer(Answer(text, "stop", None, 1, 1, 0.1), asked)[0].text == text
    think = "<think>2 + 2 is 4.</think>4"  # the name is the models' own: it is asked for to turn reasoning on
    assert without_reasoning(think, [{"role": "system", "content": "Reason in <think> first."}]).text == "4"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Reason in <reasoning>."}]}]
    assert without_reasoning(text, parts).text == text


@pytest.mark.parametrize("text", ["\u200b", " \ufeff\n", "\u2060\u200d\u00ad", "<think>Hm.</think>\u200b"])
def test_invisible_characters_alone_are_no_answer(text: str) -> None:
    read, _ = read_answer(Answer(text, "stop", None, 1, 1, 0.1))
    assert read.unfinished
    assert read.empty or read.only_reasoning
