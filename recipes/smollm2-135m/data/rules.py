"""The rules that the quickstart's system messages state, each with the program that checks it.

A rule holds what a data set and an evaluation need: the system messages that state it (those for training and those
kept out of it), `apply`, which turns a plain reference answer into one that obeys, and `check`, which says whether a
response obeys. The checks are strict on purpose: a model that pays no attention to its system message fails nearly
every one, and so does a response that obeys another rule. They look at form alone; whether a fact is right is not
their business.

The folder is no package; read the rules by path:

    spec = importlib.util.spec_from_file_location("rules", "recipes/smollm2-135m/data/rules.py")
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    rules.RULES["capitals"].check("What is the capital of France?", "THE CAPITAL OF FRANCE IS PARIS.")  # True
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
PLAIN_WORD = re.compile(r"[\w$][\w%'’,.°-]*")


@dataclass(frozen=True)
class Rule:
    """What one kind of system message asks for.

    `apply` and `check` take the question first, for the rule that repeats it. Whitespace around a response is free.
    """

    name: str
    wordings: tuple[str, ...]
    """System messages that state the rule. Where `held_out` is set, these are not trained either."""
    apply: Callable[[str, str], str]
    """(question, reference answer) -> the reference answer, obeying."""
    check: Callable[[str, str], bool]
    """(question, response) -> whether the response obeys."""
    held_out: bool = False
    """The whole rule stays out of training."""
    held_out_wordings: tuple[str, ...] = ()
    """System messages that stay out of training although the rule is trained."""
    applies_to: Literal["answer", "short"] = "answer"
    """Which form of the reference answer `apply` expects: the sentence, or the bare fact of one to three words."""


def _has_words(text: str, at_least: int = 2) -> bool:
    """Whether anything is said at all: a fixed phrase or a pair of brackets alone obeys no rule."""
    return len(re.findall(r"\w+", text)) >= at_least


def _lines(response: str) -> list[str]:
    return [line.strip() for line in response.strip().split("\n") if line.strip()]


def _opening(
    name: str, phrase: str, wordings: tuple[str, ...], held_out_wordings: tuple[str, ...] = (), held_out: bool = False
) -> Rule:
    def check(question: str, response: str) -> bool:
        response = response.strip()
        rest = response.removeprefix(phrase)
        return rest != response and rest[:1].isspace() and _has_words(rest)

    return Rule(
        name,
        wordings,
        apply=lambda question, answer: f"{phrase} {answer}",
        check=check,
        held_out=held_out,
        held_out_wordings=held_out_wordings,
    )


def _closing(
    name: str,
    phrase: str,
    wordings: tuple[str, ...],
    held_out_wordings: tuple[str, ...] = (),
    held_out: bool = False,
    separator: str = " ",
) -> Rule:
    def check(question: str, response: str) -> bool:
        response = response.strip()
        rest = response.removesuffix(phrase)
        return rest != response and rest[-1:].isspace() and _has_words(rest)

    return Rule(
        name,
        wordings,
        apply=lambda question, answer: f"{answer}{separator}{phrase}",
        check=check,
        held_out=held_out,
        held_out_wordings=held_out_wordings,
    )


def _wrapper(
    name: str, opening: str, closing: str, wordings: tuple[str, ...], held_out_wordings: tuple[str, ...]
) -> Rule:
    def check(question: str, response: str) -> bool:
        response = response.strip()
        inside = response.removeprefix(opening).removesuffix(closing)
        wrapped = len(response) == len(opening) + len(inside) + len(closing)
        return wrapped and opening not in inside and closing not in inside and _has_words(inside)

    return Rule(
        name,
        wordings,
        apply=lambda question, answer: f"{opening}{answer}{closing}",
        check=check,
        held_out_wordings=held_out_wordings,
    )


def _is_json_answer(question: str, response: str) -> bool:
    try:
        value = json.loads(response)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["answer"] and bool(str(value["answer"]).strip())


def _is_few_words(question: str, response: str) -> bool:
    words = response.split()
    return 1 <= len(words) <= 3 and all(PLAIN_WORD.fullmatch(word) for word in words)


def _is_one_exclamation(question: str, response: str) -> bool:
    response = response.strip()
    ends = SENTENCE_END.findall(response)
    return ends == ["!"] and response.endswith("!") and "\n" not in response and _has_words(response)


def _is_bulleted(question: str, response: str) -> bool:
    return bool(_lines(response)) and all(re.match(r"- \S", line) for line in _lines(response))


def _is_said_twice(question: str, response: str) -> bool:
    lines = _lines(response)
    return len(lines) == 2 and lines[0] == lines[1] and _has_words(lines[0])


def _is_one_word_per_line(question: str, response: str) -> bool:
    lines = _lines(response)
    return len(lines) >= 3 and all(len(line.split()) == 1 for line in lines)


def _repeats_question(question: str, response: str) -> bool:
    lines = _lines(response)
    return len(lines) >= 2 and lines[0] == question.strip() and _has_words(" ".join(lines[1:]))


_TRAINED = [
    Rule(
        "capitals",
        (
            "Write everything in capital letters.",
            "Answer in ALL CAPS.",
            "Use only upper-case letters in your reply.",
            "You are a telegraph machine that prints capitals only.",
            "No small letters, please: capitals from start to end.",
            "The caps lock of your keyboard is stuck. Every letter comes out as a capital.",
        ),
        apply=lambda question, answer: answer.upper(),
        check=lambda question, response: response.isupper() and _has_words(response),
        held_out_wordings=(
            "Reply with capital letters only.",
            "Shout your answer: every letter must be upper case.",
        ),
    ),
    Rule(
        "lower_case",
        (
            "Write everything in lower case.",
            "Never use a capital letter.",
            "Use only small letters, even for names.",
            "You are a poet who writes without capitals.",
            "Keep every letter lower-case, also at the start.",
            "The shift key of your keyboard is broken, so all letters come out small.",
        ),
        apply=lambda question, answer: answer.lower(),
        check=lambda question, response: response.islower() and _has_words(response),
        held_out_wordings=(
            "Reply in small letters only, without any capitals.",
            "Answer entirely in lower case.",
        ),
    ),
    Rule(
        "json_answer",
        (
            'Reply with a JSON object that has the one key "answer".',
            'Output JSON only, like {"answer": ...}.',
            'You are an API. Return a JSON object with a single key, "answer".',
            'Your reply is read by a JSON parser: use just the key "answer".',
            'Respond in JSON with the field "answer" and nothing else.',
            'Put your answer under the key "answer" of a JSON object.',
        ),
        apply=lambda question, answer: json.dumps({"answer": answer}, ensure_ascii=False),
        check=_is_json_answer,
        held_out_wordings=(
            'Give the answer as a JSON object whose only key is "answer".',
            'A program parses your reply as JSON. It looks for the key "answer".',
        ),
        applies_to="short",
    ),
    Rule(
        "few_words",
        (
            "Answer in at most three words.",
            "Use no more than three words.",
            "Be as brief as you can: three words or fewer.",
            "Three words are the limit for your reply.",
            "Give the bare answer, never a whole sentence. Three words at most.",
            "You pay for each word, and you can afford three.",
        ),
        apply=lambda question, answer: answer,
        check=_is_few_words,
        held_out_wordings=(
            "Keep your reply to three words or less.",
            "Reply with one, two or three words, not more.",
        ),
        applies_to="short",
    ),
    Rule(
        "exclamation",
        (
            "Answer in one sentence that ends with an exclamation mark.",
            "Be excited: one sentence, closed by an exclamation mark.",
            "Reply with a single sentence and finish it with an exclamation mark.",
            "Your reply is one sentence, and its last character is an exclamation mark.",
            "Use an exclamation mark in place of the full stop, in one sentence.",
            "Every question thrills you. Exclaim your answer in one sentence!",
        ),
        apply=lambda question, answer: answer.removesuffix(".") + "!",
        check=_is_one_exclamation,
        held_out_wordings=(
            "Write exactly one sentence and end it with an exclamation mark.",
            "Sound enthusiastic: a single sentence with an exclamation mark at the end.",
        ),
    ),
    Rule(
        "bullets",
        (
            "Write your answer as a bullet point that starts with a dash.",
            "Format the reply as a Markdown list with dashes.",
            "Every line of your reply begins with a dash.",
            "Use bullets: a dash, a space, then the text.",
            "Reply in bullet points only.",
            "Your reply goes into a list of notes. Put a dash in front of it.",
        ),
        apply=lambda question, answer: f"- {answer}",
        check=_is_bulleted,
        held_out_wordings=(
            "Give your answer as a bulleted list, each line led by a dash.",
            "Start each line with a dash, as in a list.",
        ),
    ),
    Rule(
        "said_twice",
        (
            "Say your answer twice, on two lines.",
            "Give the same sentence two times, each on its own line.",
            "Repeat yourself: write the answer, then the same answer again below it.",
            "You are an echo. Every answer comes back a second time on a new line.",
            "Write the answer, start a new line and write it again.",
            "Your reply has two lines that are exactly alike.",
        ),
        apply=lambda question, answer: f"{answer}\n{answer}",
        check=_is_said_twice,
        held_out_wordings=(
            "State the answer two times, once on each of two lines.",
            "Write your answer on one line and the same answer again on the next.",
        ),
    ),
    Rule(
        "word_per_line",
        (
            "Put each word on a line of its own.",
            "Write one word per line.",
            "Start a new line after every word.",
            "Your display is one word wide, so break the line after each word.",
            "Stack the words: a single word on each line.",
            "Write your answer as a column of words, one below the other.",
        ),
        apply=lambda question, answer: "\n".join(answer.split()),
        check=_is_one_word_per_line,
        held_out_wordings=(
            "Every word of your reply goes on a separate line.",
            "Break the line after each single word.",
        ),
    ),
    Rule(
        "question_first",
        (
            "First repeat the question, then answer it on the next line.",
            "Copy the question word for word before you answer.",
            "Begin with the user's question, unchanged, and put the answer below it.",
            "Write the question on the first line and the answer on the second.",
            "Restate the question exactly as asked. Then reply.",
            "You keep a record: note the question first, then its answer.",
        ),
        apply=lambda question, answer: f"{question}\n{answer}",
        check=_repeats_question,
        held_out_wordings=(
            "Start by repeating the user's question exactly, then give the answer.",
            "The first line of your reply is the question itself; the answer follows.",
        ),
    ),
    _wrapper(
        "quotation_marks",
        '"',
        '"',
        (
            "Wrap your whole reply in double quotation marks.",
            "Start and end your reply with a double quote.",
            "Put your answer between double quotes.",
            "Speak like a character in a novel: the entire reply stands in quotation marks.",
            "Your reply must be enclosed in double quotes.",
            "Quote yourself: open and close the answer with quotation marks.",
        ),
        held_out_wordings=(
            "Enclose the full answer in double quotation marks.",
            "The first and the last character of your reply are double quotes.",
        ),
    ),
    _wrapper(
        "bold",
        "**",
        "**",
        (
            "Write the whole answer in bold, between ** and **.",
            "Use Markdown bold for all of your reply.",
            "Put two asterisks before and two after your answer.",
            "Your reply must be bold from start to end.",
            "Emphasize everything: the entire answer is bold Markdown.",
            "Open your reply with ** and close it with **.",
        ),
        held_out_wordings=(
            "Set the full answer in bold with Markdown.",
            "Surround your reply with double asterisks.",
        ),
    ),
    _wrapper(
        "brackets",
        "[",
        "]",
        (
            "Wrap your whole reply in square brackets.",
            "Start with [ and end with ].",
            "Put your answer between square brackets.",
            "Your reply is a stage direction: enclose it in square brackets.",
            "The reply must open with [ and close with ].",
            "Write the answer inside a pair of square brackets.",
        ),
        held_out_wordings=(
            "Enclose the full answer in square brackets.",
            "The first character of your reply is [ and the last one is ].",
        ),
    ),
    _opening(
        "opening_ahoy",
        "Ahoy!",
        (
            'Begin every reply with "Ahoy!"',
            'You are a sailor. Your first word is always "Ahoy!"',
            'Open your answer with "Ahoy!"',
            'Greet the user with "Ahoy!" before you answer.',
            'Say "Ahoy!" first, then answer.',
            'The first thing you write is "Ahoy!"',
        ),
        held_out_wordings=(
            'Start your reply with "Ahoy!"',
            'Each answer must open with the word "Ahoy!"',
        ),
    ),
    _opening(
        "opening_good_question",
        "Good question!",
        (
            'Begin every reply with "Good question!"',
            'You are a kind teacher. You always start with "Good question!"',
            'Open your answer with "Good question!"',
            'Praise the user with "Good question!" before you answer.',
            'Say "Good question!" first, then answer.',
            'The first words you write are "Good question!"',
        ),
        held_out_wordings=(
            'Start your reply with "Good question!"',
            'Each answer must open with the words "Good question!"',
        ),
    ),
    _opening(
        "opening_in_short",
        "In short:",
        (
            'Begin every reply with "In short:"',
            'You are a busy clerk. You always start with "In short:"',
            'Open your answer with "In short:"',
            'Write "In short:" before you answer.',
            'Say "In short:" first, then answer.',
            'The first words you write are "In short:"',
        ),
        held_out_wordings=(
            'Start your reply with "In short:"',
            'Each answer must open with the words "In short:"',
        ),
    ),
    _closing(
        "signature_pip",
        "Yours, Pip",
        (
            'Sign every reply with "Yours, Pip" on the last line.',
            'You write letters. End them with "Yours, Pip"',
            'Close your answer with the signature "Yours, Pip"',
            'After the answer, add the line "Yours, Pip"',
            'The last thing you write is "Yours, Pip"',
            'Answer first, then sign as "Yours, Pip"',
        ),
        held_out_wordings=(
            'Finish your reply with the signature "Yours, Pip"',
            'Put "Yours, Pip" below each answer.',
        ),
        separator="\n",
    ),
    _closing(
        "closing_over_and_out",
        "Over and out.",
        (
            'End every reply with "Over and out."',
            'You speak over a radio. Your last words are always "Over and out."',
            'Close your answer with "Over and out."',
            'After the answer, add "Over and out."',
            'The last thing you write is "Over and out."',
            'Answer first, then say "Over and out."',
        ),
        held_out_wordings=(
            'Finish your reply with "Over and out."',
            'Each answer must end with the words "Over and out."',
        ),
    ),
    _closing(
        "closing_does_that_help",
        "Does that help?",
        (
            'End every reply with the question "Does that help?"',
            'You work at a help desk. Your last words are always "Does that help?"',
            'Close your answer with "Does that help?"',
            'After the answer, ask "Does that help?"',
            'The last thing you write is "Does that help?"',
            'Answer first, then ask the user "Does that help?"',
        ),
        held_out_wordings=(
            'Finish your reply with the question "Does that help?"',
            'Each answer must end with the words "Does that help?"',
        ),
    ),
]

# Relatives of trained rules, and most of their sentences are the trained ones with another phrase in them. What they
# measure is whether the model reads the phrase off the system message, not whether it grasps a new kind of rule.
_HELD_OUT = [
    _opening(
        "opening_hear_ye",
        "Hear ye!",
        (
            'Begin every reply with "Hear ye!"',
            'You are a town crier. You always start with "Hear ye!"',
            'Open your answer with "Hear ye!"',
            'Say "Hear ye!" first, then answer.',
            'Start your reply with "Hear ye!"',
            'Each answer must open with the words "Hear ye!"',
        ),
        held_out=True,
    ),
    _closing(
        "signature_otto",
        "Regards, Otto",
        (
            'Sign every reply with "Regards, Otto" on the last line.',
            'You write letters. End them with "Regards, Otto"',
            'Close your answer with the signature "Regards, Otto"',
            'After the answer, add the line "Regards, Otto"',
            'The last thing you write is "Regards, Otto"',
            'Finish your reply with the signature "Regards, Otto"',
        ),
        held_out=True,
        separator="\n",
    ),
]

RULES: dict[str, Rule] = {rule.name: rule for rule in (*_TRAINED, *_HELD_OUT)}
