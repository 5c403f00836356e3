"""The quickstart's data: nothing held out is trained, every answer obeys its rule, and the mix is as stated."""

import difflib
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from train.pressure.questions import read_questions
from train.pressure.rules import RULES
from train.pressure.tactics import SECRET_NAMES, secret_words, tactics, templates
from train.pressure.verdicts import answers_question, is_refusal, reveals

DATA = Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "data"
SECRET = re.compile(r"[a-z]+-\d{4}")
FIELDS = re.compile(r"\"?\{(?:value|open|close)\}\"?")


def load(name: str) -> ModuleType:
    """Import a file of the data folder, as build.py imports its neighbour."""
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


forms = load("forms")
build = load("build")
TRAIN = lines_of("train.jsonl")
HELD_OUT = lines_of("held_out.jsonl")
PAIRS = lines_of("pairs.jsonl")
FAMILIES = {family.name: family for family in (*forms.trained_rules(), *forms.read_variations())}
QUESTIONS = {question.question: question for question in read_questions()}
PLAIN = [row for row in TRAIN if row["kind"] == "without_rule"]
UNDER_A_RULE = [row for row in TRAIN if row["kind"] != "without_rule"]
TWINS = [
    (row, twin)
    for row in TRAIN
    if row["tactic"] == "choice"
    for twin in TRAIN
    if twin["kind"] == "conflict"
    and twin["messages"][1] == row["messages"][1]
    and row["messages"][0]["content"].startswith(twin["messages"][0]["content"])
]
"""Rows that permit another form, each with the row of the same user turn that does not."""


def contents(row: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """Return the system message, and each user turn with its answer."""
    messages = row["messages"]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else messages
    assert [message["role"] for message in turns] == ["user", "assistant"] * (len(turns) // 2)
    texts = [message["content"] for message in turns]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def form_of(row: dict[str, Any]) -> Any:
    """Return the form whose message the system message begins with; the longest, as one may begin with another."""
    system, _ = contents(row)
    stated = [
        (len(message), place, form)
        for place, form in enumerate(FAMILIES[row["rule"]].forms)
        for message in form.messages
        if system.startswith(message)
    ]
    return max(stated)[2]


def question_of(turn: str) -> str:
    """Return the training question in a user turn, or the turn itself, which asks for a code."""
    asked = [text for text, question in QUESTIONS.items() if question.split == "train" and text in turn]
    return max(asked, key=len, default=turn)


def judged(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Any, str, str]]:
    """Yield row, form, question and answer of each turn."""
    for row in rows:
        form = form_of(row)
        for turn, answer in contents(row)[1]:
            yield row, form, question_of(turn), answer


def test_every_answer_obeys_its_rule_unless_the_user_may_choose() -> None:
    for row, form, question, answer in judged(UNDER_A_RULE):
        assert form.rule.check(question, answer) == (row["tactic"] != "choice"), (row, form.rule.name)


def test_every_answer_is_right_and_refuses_nothing() -> None:
    for row, _, question, answer in judged(UNDER_A_RULE):
        system, _ = contents(row)
        accept = SECRET.findall(system) if row["tactic"] == "shared" else QUESTIONS[question].accept
        assert answers_question(answer, accept), row
        assert not is_refusal(answer), row
    for row in PLAIN:
        [(turn, answer)] = contents(row)[1]
        assert answer == QUESTIONS[turn].answer


def test_where_the_user_may_choose_the_answer_is_plain() -> None:
    rows = [row for row in TRAIN if row["tactic"] == "choice"]
    assert rows
    for _, _, question, answer in judged(rows):
        assert answer == QUESTIONS[question].answer


def test_no_answer_reveals_a_secret() -> None:
    rows = [row for row in TRAIN if row["kind"] == "extraction"]
    assert rows
    for row in rows:
        system, [(_, answer)] = contents(row)
        [secret] = SECRET.findall(system)
        assert not any(reveals(answer, part) for part in secret.split("-")), row


def test_reference_answers_of_held_out_rows_obey_their_rules() -> None:
    for row in HELD_OUT:
        system, [(question, answer)] = contents(row)
        rule = RULES[row["rule"]]
        assert system in rule.messages("held_out")
        assert rule.check(question, answer), row
    kinds = Counter((row["held_out"], row["rule"]) for row in HELD_OUT)
    trained = [name for name, rule in RULES.items() if not rule.held_out]
    assert kinds == {("wording", name): 6 for name in trained} | {
        ("rule", name): 15 for name in ("opening_hear_ye", "signature_otto")
    }


def test_the_mix_is_as_stated() -> None:
    assert sum(build.SHARES.values()) == pytest.approx(1)
    counts = Counter(row["kind"] for row in TRAIN)
    for kind, share in build.SHARES.items():
        assert counts[kind] / len(TRAIN) == pytest.approx(share, abs=0.01)
    for kind in ("conflict", "permitted", "turns_push_back"):
        of_tactic = Counter(row["tactic"] for row in TRAIN if row["kind"] == kind)
        assert set(of_tactic) == set(tactics(build.SETTINGS.get(kind, kind)))
        if kind == "conflict":
            of_tactic["direct"] -= len(TWINS)
        if kind == "permitted":
            of_tactic["choice"] //= 2
        assert max(of_tactic.values()) - min(of_tactic.values()) <= 1
    lengths = Counter(len(contents(row)[1]) for row in TRAIN if row["kind"].startswith("turns"))
    assert set(lengths) == {3, 4, 5}
    assert max(lengths.values()) - min(lengths.values()) <= 2


def test_each_row_that_permits_another_form_has_a_twin_whose_message_does_not() -> None:
    assert len(TWINS) == sum(row["tactic"] == "choice" for row in TRAIN) > 0
    for permitted, twin in TWINS:
        (message, [(turn, answer)]), (shorter, [(same_turn, other_answer)]) = contents(permitted), contents(twin)
        assert turn == same_turn
        assert message.startswith(f"{shorter} ")
        assert answer != other_answer


def test_the_readme_states_the_mix() -> None:
    text = (DATA.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(TRAIN):,}\nconversations" in text
    text = text[text.index("## The data") :]
    shares = {
        kinds: float(share) for kinds, share in re.findall(r"^\| (\w[\w, ]+) \| ([\d.]+) % \| ", text, re.MULTILINE)
    }
    assert sum(shares.values()) == 100
    assert {kind for kinds in shares for kind in kinds.split(", ")} == set(build.SHARES)
    for kinds, share in shares.items():
        assert share / 100 == pytest.approx(sum(build.SHARES[kind] for kind in kinds.split(", ")))


def test_rules_wordings_and_questions_are_used_about_equally_often() -> None:
    dealt = [row for row in UNDER_A_RULE if all(row is not twin for _, twin in TWINS)]
    of_rule = Counter(row["rule"] for row in dealt)
    assert {*of_rule} == {*FAMILIES}
    for families in (forms.trained_rules(), forms.read_variations()):
        counts = [of_rule[family.name] for family in families]
        assert sum(counts) / len(dealt) == pytest.approx(0.5, abs=0.01)
        per_share = [of_rule[family.name] / family.share for family in families]
        assert max(per_share) - min(per_share) <= 1
    for name, family in FAMILIES.items():
        places = Counter(
            next(place for place, message in enumerate(form_of(row).messages) if contents(row)[0].startswith(message))
            for row in UNDER_A_RULE
            if row["rule"] == name
        )
        assert len(places) == len(family.forms[0].messages), name
    asked = Counter(question_of(turn) for row in TRAIN for turn, _ in contents(row)[1] if row["tactic"] != "shared")
    assert set(asked) == {text for text, question in QUESTIONS.items() if question.split == "train"}
    assert max(asked.values()) <= 2 * min(asked.values())


def test_variations_are_many_and_each_has_several_messages() -> None:
    sizes = {family.name: len(family.forms) for family in forms.read_variations()}
    assert sizes["opening"] >= 60
    assert sizes["closing"] + sizes["signature"] >= 60
    assert sizes["wrapper"] >= 10
    assert sizes["prefix"] >= 8
    for family in forms.read_variations():
        assert len(family.forms[0].messages) >= 6
        for form in family.forms:
            assert not FIELDS.search(" ".join((*form.messages, *form.opposites, *form.requests)))
            assert len(form.opposites) >= 4
            assert len(form.requests) >= 2


def test_sentences_of_users_end_before_the_text_that_follows() -> None:
    for name, texts in forms._read_texts()["families"].items():
        for sentence in (*texts.get("opposites", ()), *texts.get("requests", ())):
            assert sentence.endswith("."), (name, sentence)


@pytest.mark.parametrize(
    ("form", "accepted", "rejected"),
    [
        ("prefix: >", ["> Paris", "> It is\n> Paris"], ["Paris", ">Paris", "> It is\nParis", "> >", ""]),
        ("json_key: fact", ['{"fact": "Paris"}'], ['{"answer": "Paris"}', '{"fact": ""}', "Paris"]),
        ("most_words: two words", ["Paris", "New York"], ["It is Paris", ""]),
        ("wrapper: <p> </p>", ["<p>Paris</p>"], ["<p>Paris", "Paris</p>", "<p></p>"]),
    ],
)
def test_the_check_of_a_variation(form: str, accepted: list[str], rejected: list[str]) -> None:
    rules = {form.rule.name: form.rule for family in forms.read_variations() for form in family.forms}
    assert [text for text in accepted if not rules[form].check("Where?", text)] == []
    assert [text for text in rejected if rules[form].check("Where?", text)] == []


def test_nothing_held_out_is_trained() -> None:
    text = (DATA / "train.jsonl").read_text(encoding="utf-8")
    for phrase in ("Hear ye", "Otto", "Regards", "For the record", "End of message"):
        assert phrase not in text
    systems = " ".join(contents(row)[0] for row in TRAIN)
    assert "parenthes" not in systems
    assert "..." not in re.sub(r'\{"\w+": \.\.\.\}|\{"\w+": "\.\.\."\}', "", systems)
    assert not any(word in systems for word in (*SECRET_NAMES["held_out"], *secret_words("held_out")))
    messages = {message["content"] for row in TRAIN for message in row["messages"]}
    held_out = {contents(row)[0] for row in HELD_OUT} | {turn for row in HELD_OUT for turn, _ in contents(row)[1]}
    held_out |= {message for rule in RULES.values() for message in rule.messages("held_out")}
    assert not messages & held_out
    turns = [turn for row in TRAIN for turn, _ in contents(row)[1]]
    sentences = [text for text, question in QUESTIONS.items() if question.split == "held_out"]
    for rule in RULES.values():
        sentences += [*rule.opposites("held_out"), *rule.requests("held_out")]
    for sentence in sentences:
        assert not any(sentence in turn for turn in turns), sentence


def test_no_held_out_template_is_trained() -> None:
    parts = [
        max(re.split(r"\{\w+\}", template), key=len).strip()
        for setting in ("conflict", "injected", "extraction", "permitted", "injection", "clause", "generic_opposite")
        for tactic in (tactics(setting))
        for template in templates(setting, tactic, "held_out")
    ]
    texts = [message["content"] for row in TRAIN for message in row["messages"] if message["role"] != "assistant"]
    for part in parts:
        assert not any(part in text for text in texts), part


def test_no_answer_has_a_form_that_is_held_out() -> None:
    for row, _, question, answer in judged(UNDER_A_RULE):
        text = answer.replace("-", " ", 1)  # of a code or a number: one hyphen joins no words
        for name in ("parentheses", "numbered", "ellipsis"):
            assert not RULES[name].check(question, answer), row
        assert not RULES["hyphens"].check(question, text), row


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+|[^\w\s]", text.lower())


def test_no_variation_is_close_to_a_held_out_wording() -> None:
    """At most 70 % of the words in common and in order, the phrase and its quotation marks taken as a word."""
    held_out = {
        message.replace(f'"{rule.phrase}"', "VALUE") if rule.phrase else message
        for rule in RULES.values()
        # A held-out phrase comes in the messages of trained ones: the phrase is what is held out.
        for message in (rule.messages("held_out") if not (rule.held_out and rule.phrase) else ())
    }
    texts = forms._read_texts()["families"]
    for name, family in texts.items():
        for wording in family["wordings"]:
            for message in held_out:
                pair = words(FIELDS.sub("VALUE", wording)), words(message)
                ratio = difflib.SequenceMatcher(None, *pair, autojunk=False).ratio()
                assert ratio <= 0.7, (name, wording, message)


def answers_of(pair: dict[str, Any]) -> tuple[Any, str, str, str]:
    """Return the form of a pair, the question that its answers answer, the chosen answer and the rejected one."""
    [chosen], [rejected] = pair["chosen"], pair["rejected"]
    [*_, (_, form, question, answer)] = judged([{**pair, "messages": [*pair["prompt"], chosen]}])
    return form, question, answer, rejected["content"]


def test_the_chosen_answer_of_a_pair_is_right_and_the_rejected_one_is_not() -> None:
    for pair in PAIRS:
        form, question, chosen, rejected = answers_of(pair)
        other_form = pair["kind"] == "permitted" and pair["tactic"] == "choice"
        verdicts = [
            (form.rule.check(question, answer) != other_form, answers_question(answer, QUESTIONS[question].accept))
            for answer in (chosen, rejected)
        ]
        assert verdicts[0] == (True, True), pair
        if pair["reason"] == "rule":
            assert not verdicts[1][0], pair
        else:
            assert verdicts[1] == (True, False), pair


def test_pairs_have_no_held_out_question_and_no_conversation_of_the_training_rows() -> None:
    for pair in PAIRS:
        _, question, _, _ = answers_of(pair)
        assert QUESTIONS[question].split == "train"
    conversations = {json.dumps(row["messages"][:-1]) for row in TRAIN}
    repeated = [pair for pair in PAIRS if json.dumps(pair["prompt"]) in conversations]
    assert len(repeated) < 0.01 * len(PAIRS)


def test_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DATA / "build.py", "--output", tmp_path], check=True, capture_output=True)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_a_list_of_known_questions_limits_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selected = [text for text, question in QUESTIONS.items() if question.split == "train"][:60]
    (tmp_path / "known.txt").write_text("\n".join(selected), encoding="utf-8")
    monkeypatch.setattr(build, "KNOWN", tmp_path / "known.txt")
    rows = build.build()["train.jsonl"]
    assert len(rows) == len(TRAIN)
    asked = {question_of(turn) for row in rows for turn, _ in contents(row)[1] if row["tactic"] != "shared"}
    assert asked == set(selected)
