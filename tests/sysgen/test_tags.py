"""Parsing of tagged system messages and verdicts as models write them."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train.sysgen.tags import TAGS, Phrase, TaggedMessage, parse, parse_verdicts


def phrases(text: str) -> list[tuple[str, str]]:
    return [(phrase.tag, phrase.text) for phrase in parse(text).phrases]


def reasons(text: str) -> list[tuple[str, str, str]]:
    return [(dropped.tag, dropped.text, dropped.reason) for dropped in parse(text).dropped]


ALONE = "a tag inside without a partner, or none of the eight"

WRITTEN = {
    "as asked": ("<<Role>>a nurse<</Role>> <<Style>>warm<</Style>>", [("Role", "a nurse"), ("Style", "warm")]),
    "out of order": (
        "<<Format>>f<</Format>><<Tool>>t<</Tool>><<Role>>r<</Role>>",
        [("Role", "r"), ("Tool", "t"), ("Format", "f")],
    ),
    "a tag twice, in its own order": (
        "<<Task>>b<</Task>><<Role>>r<</Role>><<Task>>a<</Task>>",
        [("Role", "r"), ("Task", "b"), ("Task", "a")],
    ),
    "the opening tag again": ("<<Role>>a nurse<<Role>> <<Task>>help<<Task>>", [("Role", "a nurse"), ("Task", "help")]),
    "two slashes": ("<<Role>>a nurse<<//Role>>", [("Role", "a nurse")]),
    "a slash behind": ("<<Role>>a nurse<<Role/>>", [("Role", "a nurse")]),
    "a backslash": (r"<<Role>>a nurse<<\Role>>", [("Role", "a nurse")]),
    "blanks": ("<< Background >>a ward<</ Background\t>>", [("Background", "a ward")]),
    "plurals": ("<<Tasks>>help<</Tasks>><<Tools>>x<</Tool>>", [("Task", "help"), ("Tool", "x")]),
    "case": ("<<ROLE>>a<</role>>", [("Role", "a")]),
    "over several lines": ("<<Role>>\n  a\n  b\n<</Role>>", [("Role", "a\n  b")]),
    "in a code fence": ("```xml\n<<Role>>a<</Role>>\n<<Task>>b<</Task>>\n```", [("Role", "a"), ("Task", "b")]),
    "in bold": ("**<<Role>>a<</Role>>**", [("Role", "a")]),
    "other languages": ("<<Role>>당신은 간호사입니다.<</Role>>", [("Role", "당신은 간호사입니다.")]),
    "tags in code are text": (
        "<<Format>>Answer like\n```\n<<Task>>x<</Task>> <<Role>>\n```\nonly<</Format>>",
        [("Format", "Answer like\n```\n<<Task>>x<</Task>> <<Role>>\n```\nonly")],
    ),
    "tags in inline code are text": (
        "<<Task>>Explain `<<Role>>` first<</Task>>",
        [("Task", "Explain `<<Role>>` first")],
    ),
    "tags in code beside a phrase inside": (
        "<<Task>>Explain `<<Role>>` <<Style>>briefly<</Style>><</Task>>",
        [("Task", "Explain `<<Role>>`"), ("Style", "briefly")],
    ),
    "code that ends behind the phrase is none": (
        "<<Format>>x\n```\n<</Format>> <<Style>>y\n```\n<</Style>>",
        [("Style", "y\n```"), ("Format", "x\n```")],
    ),
    "shifts are no tags": (
        "<<Task>>print(1 << 2 >> 1), cin >> x, <<'here'>><</Task>>",
        [("Task", "print(1 << 2 >> 1), cin >> x, <<'here'>>")],
    ),
    "a colon behind the tag": (
        "<<Role>>: a nurse<</Role>> <<Style>>：亲切<</Style>>",
        [("Role", "a nurse"), ("Style", "亲切")],
    ),
    "a colon that is text": ("<<Style>>:) often<</Style>><<Task>>:x<</Task>>", [("Task", ":x"), ("Style", ":) often")]),
    "tags in bold": (
        "**<<Role>>** a nurse **<</Role>>** *<<Task>>*help*<</Task>>*",
        [("Role", "a nurse"), ("Task", "help")],
    ),
    "one tag in bold": ("**<<Role>>**: a nurse<</Role>>", [("Role", "a nurse")]),
    "all in bold": ("**<<Role>>a **kind** nurse<</Role>>**", [("Role", "a **kind** nurse")]),
    "bold within, and bold before": ("**Who:**<<Role>>**a nurse**, kind<</Role>>", [("Role", "**a nurse**, kind")]),
    "bold of its own": ("<<Role>>**a nurse**<</Role>>", [("Role", "**a nurse**")]),
    "tags as code": ("`<<Role>>`a nurse`<</Role>>`", [("Role", "a nurse")]),
    "three brackets": ("<<<Role>>>a nurse<<</Role>>>", [("Role", "a nurse")]),
    "a comparison": ("<<Role>>>5 and <6<</Role>>", [("Role", ">5 and <6")]),
    "None that is part of a phrase": ("<<Style>>None of it in jest<</Style>>", [("Style", "None of it in jest")]),
    "nothing": ("", []),
    "no tags": ("You are a nurse.", []),
    "inside, at the end": (
        "<<Task>>Write <<Style>>with wit<</Style>><</Task>>",
        [("Task", "Write"), ("Style", "with wit")],
    ),
    "inside, at the start": (
        "<<Task>><<Style>>With wit<</Style>> write<</Task>>",
        [("Task", "write"), ("Style", "With wit")],
    ),
    "inside, in the middle": ("<<Role>>a <<Style>>kind<</Style>> nurse<</Role>>", [("Role", "a kind nurse")]),
    "three deep": (
        "<<Role>><<Task>><<Style>>s<</Style>> t<</Task>> r<</Role>>",
        [("Role", "r"), ("Task", "t"), ("Style", "s")],
    ),
    "a wrapper that is none of the eight": (
        "<<System>><<Role>>r<</Role>><<Task>>t<</Task>><</System>>",
        [("Role", "r"), ("Task", "t")],
    ),
    "a wrapper that is one": (
        "<<Role>><<Task>>t<</Task>><<Style>>s<</Style>><</Role>>",
        [("Task", "t"), ("Style", "s")],
    ),
}


@pytest.mark.parametrize(("text", "expected"), WRITTEN.values(), ids=WRITTEN)
def test_phrases_that_are_kept(text: str, expected: list[tuple[str, str]]) -> None:
    assert phrases(text) == expected


NOTHING = [
    "None needed", "None specified.", "Not specified.", "No specific tools are needed.", "(empty)", "...", "-", "phrase",
    "[phrase]", "Not applicable here.", "Nothing", "No background provided", "No tools are required for this task.",
    "Not mentioned in the conversation.", "No additional context", "There are no tools available", "keine", "无",
]  # fmt: skip
SOMETHING = [
    "None of the steps may be skipped.", "Nothing but the answer.", "Not a word more than needed.", "No jargon.",
    "No emojis are allowed.", "No more words than needed.", "Phrase it kindly.", "Use no tools.", "No background noise.",
    "Name the null value.", "Keine Fremdwörter.",
]  # fmt: skip


@pytest.mark.parametrize("text", NOTHING)
def test_a_phrase_without_content_is_dropped(text: str) -> None:
    read = parse(f"<<Role>>r<</Role>><<Tool>>{text}<</Tool>>")
    assert read.tags == ("Role",)
    assert [(dropped.tag, dropped.text, dropped.reason) for dropped in read.dropped] == [("Tool", text, "says nothing")]


@pytest.mark.parametrize("text", SOMETHING)
def test_a_phrase_that_forbids_something_is_kept(text: str) -> None:
    assert phrases(f"<<Tool>>{text}<</Tool>>") == [("Tool", text)]


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<|eot_id|>\n", " <end_of_turn>"])
def test_control_tokens_at_the_end_of_a_phrase_are_removed(token: str) -> None:
    read = parse(f"<<Role>>You are a cook.{token}<</Role>>")
    assert [phrase.text for phrase in read.phrases] == ["You are a cook."]
    assert read.repairs == {"control tokens at the end": 1}


LEFT_OUT = {
    "outside": ("hello <<Role>>r<</Role>> bye", [("Role", "r")], [("", "hello", "outside any tag"), ("", "bye", "outside any tag")]),
    "invented": ("<<Example>>e<</Example>><<Role>>r<</Role>>", [("Role", "r")], [("Example", "e", "none of the eight tags")]),
    "of two words": ("<<Conversational History>>h<</Conversational History>>", [], [("Conversational History", "h", "none of the eight tags")]),
    "never closed": ("<<Role>>r <<Task>>t<</Task>>", [("Task", "t")], [("Role", "r", "never closed")]),
    "never closed, then right": ("<<Role>>x <<Role>>r<</Role>>", [("Role", "r")], [("Role", "x", "never closed")]),
    "closed by another": ("<<Role>>r<</Task>>", [], [("Role", "r", "never closed"), ("Task", "", "closed and never opened")]),
    "closed by another, then its own": ("<<Role>>r<</Task>> x<</Role>>", [], [("Role", "r<</Task>> x", ALONE)]),
    "crossed": ("<<Role>>a<<Task>>b<</Role>>c<</Task>>", [], [("Role", "a<<Task>>b", ALONE), ("", "c", "outside any tag"), ("Task", "", "closed and never opened")]),
    "only closed": ("r<</Role>>", [], [("", "r", "outside any tag"), ("Role", "", "closed and never opened")]),
    "empty": ("<<Role>> \n <</Role>>", [], [("Role", "", "empty")]),
    "invented inside": ("<<Role>>a <<Example>>e<</Example>><</Role>>", [], [("Role", "a", ALONE), ("Example", "e", "none of the eight tags")]),
    "a placeholder inside": ("<<Role>>help <<name>> now<</Role>>", [], [("Role", "help <<name>> now", ALONE)]),
    "a right one inside a wrong one": ("<<Role>>a <<oops>><<Style>>s<</Style>><</Role>>", [("Style", "s")], [("Role", "a <<oops>>", ALONE)]),
    "part of another": ("<<Role>>a <<Style>>kind<</Style>> nurse<</Role>>", [("Role", "a kind nurse")], [("Style", "kind", "part of the phrase around it")]),
    "none": ("<<Tool>>None.<</Tool>><<Role>> n/a <</Role>>", [], [("Tool", "None.", "says nothing"), ("Role", "n/a", "says nothing")]),
    "a colon alone": ("<<Tool>>: <</Tool>>", [], [("Tool", ":", "empty")]),
    "all unclosed": ("<<Role>>r\n<<Task>>t\n<<Role>>s", [], [("Role", "r", "never closed"), ("Task", "t", "never closed"), ("Role", "s", "never closed")]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "kept", "dropped"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_dropped_texts_and_their_reasons(
    text: str, kept: list[tuple[str, str]], dropped: list[tuple[str, str, str]]
) -> None:
    assert phrases(text) == kept
    assert sorted(reasons(text)) == sorted(dropped)


@pytest.mark.parametrize(
    ("text", "repairs"),
    [
        ("<<Role>>r<</Role>>", {}),
        ("<<Role>>r<<Role>>", {"opening tag as closer": 1}),
        ("<<Role>>r<<//Role>>", {"slashes": 1}),
        ("<<Role >>r<</ Role>>", {"blanks inside": 2}),
        ("<<Tasks>>t<</Task>>", {"plural": 1}),
        ("<<task>>t<</TASK>>", {"upper or lower case": 2}),
        (
            "<< tasks>>t<<tasks>>",
            {"plural": 2, "upper or lower case": 2, "blanks inside": 1, "opening tag as closer": 1},
        ),
        ("<<example >>e<</Example>>", {}),
        ("<<Role>>: r<</Role>>", {"colon behind the tag": 1}),
        ("**<<Role>>**: r<</Role>>", {"marks around the tag": 1, "colon behind the tag": 1}),
        ("<<Role>>: r <<Task>>t<</Task>> s<</Role>>", {"colon behind the tag": 1}),
    ],
)
def test_every_repair_is_counted(text: str, repairs: dict[str, int]) -> None:
    assert parse(text).repairs == repairs


def test_the_message_and_its_parts() -> None:
    message = parse("<<Style>>Be brief.<</Style>><<Role>>You are a nurse.<</Role>><<Style>>Be kind.<</Style>>")
    assert message.text == "You are a nurse. Be brief. Be kind."
    assert message.tags == ("Role", "Style")
    assert message.render() == (
        "<<Role>>You are a nurse.<</Role>>\n<<Style>>Be brief.<</Style>>\n<<Style>>Be kind.<</Style>>"
    )
    shorter = message.without({"Style"}, "judged Bad")
    assert shorter.text == "You are a nurse."
    assert [(dropped.tag, dropped.text, dropped.reason) for dropped in shorter.dropped] == [
        ("Style", "Be brief.", "judged Bad"),
        ("Style", "Be kind.", "judged Bad"),
    ]


NAMES = st.sampled_from([*TAGS, "Example", "System"])
WORD = st.text("abc`~\n <>/\\xé漢\u2028", max_size=8) | st.sampled_from(
    ["```\n", "\n```", "`", "~~~", "<<", ">>", "<</", "**", ": ", "：", "none"]
)
MARK = st.builds(
    "<<{}{}{}{}>>".format,
    st.sampled_from(["", "", "/", "//", " /", "\\"]),
    st.sampled_from(["", "", " "]),
    NAMES | NAMES.map(str.lower) | NAMES.map(lambda name: name + "s"),
    st.sampled_from(["", "", " ", "/"]),
)
SOUP = st.lists(st.one_of(WORD, MARK, MARK), max_size=24).map("".join)
ANYTHING = SOUP | st.text() | st.text("<>/RoleTask `\n", max_size=60)


@settings(max_examples=400, deadline=None)
@given(ANYTHING)
@example("<<Format>>```\n<<Role>>x<</Role>>\n```<</Format>>")
@example("<<Task>>a <<<Style>><Role>> b<</Style>> c<</Task>>")
def test_parsing_a_rendered_message_changes_nothing(text: str) -> None:
    message = parse(text)
    again = parse(message.render())
    assert again == message
    assert (again.repairs, again.dropped) == ({}, ())


@settings(max_examples=400, deadline=None)
@given(ANYTHING)
@example("<<Role>>``````<<Role>>`<</Role>>")  # six backticks and one enclose nothing
@example("<<Role>>``<<Task>>`<</Task>>``<</Role>>")
def test_no_invalid_phrase_is_kept(text: str) -> None:
    message = parse(text)
    assert [TAGS.index(phrase.tag) for phrase in message.phrases] == sorted(
        TAGS.index(phrase.tag) for phrase in message.phrases
    )
    for phrase in message.phrases:
        assert phrase.text.strip() == phrase.text != ""
        bare = re.sub(r"(?sm)^[^\S\n]*(`{3,}|~{3,})[^\n]*\n(.*?\n)?[^\S\n]*\1[`~]*[^\S\n]*$", "", phrase.text)
        bare = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", bare)
        assert not re.search(
            rf"<<[ \t/\\]*({'|'.join([*TAGS, 'Example', 'System'])})s?[ \t/\\]*>>", bare, re.IGNORECASE
        )
        # Its tag is written at least twice, before its text and behind it.
        marks = [match.start() for match in re.finditer(rf"<<[\s/\\]*{phrase.tag}s?[\s/\\]*>>", text, re.IGNORECASE)]
        letters = [text.find(letter) for letter in phrase.text if not letter.isspace()]
        assert len(marks) >= 2
        assert min(letters) >= 0
        assert min(marks) < max(text.rfind(letter) for letter in phrase.text if not letter.isspace())


@settings(max_examples=400, deadline=None)
@given(SOUP)
def test_no_phrase_in_the_prompts_form_is_lost(text: str) -> None:
    # A tag, text without a tag, its closer: found by a pattern, where no code could make it text.
    text = text.replace("`", "'").replace("~", "-")
    message = parse(text)
    kept = [(phrase.tag, phrase.text) for phrase in message.phrases]
    for tag, phrase in re.findall(rf"<<({'|'.join(TAGS)})>>([^<>]*)<</\1>>", text):
        if re.search(r"\w", phrase):
            whole = (tag, phrase.strip()) in kept
            assert whole or any(phrase.strip() in held for _, held in kept)


@pytest.mark.parametrize(
    "text", ["<<Role>>a", "<<Role>>a<<Task>>", "<</Role>>a", "<<x>>`", "```\n<<Role>>\n", "<<", "<<a "]
)
def test_a_message_that_repeats_itself_is_parsed_in_reasonable_time(text: str) -> None:
    assert parse(parse(text * 300).render()) == parse(text * 300)
    assert phrases(text * 300 + "<</Task>><</Role>>" * 300 + "<<Tool>>t<</Tool>>")[-1] == ("Tool", "t")


def test_a_thousand_nested_phrases_are_parsed() -> None:
    levels = 1_000
    text = "<<Role>>a <<Task>>b " * levels + "<</Task>><</Role>>" * levels
    assert phrases(text) == [("Role", "a")] * levels + [("Task", "b")] * levels
    text = "<<Role>>a <<Task>>b " * levels + "c<</Task>>d<</Role>>" * levels
    assert phrases(text) == [("Role", "a b " * levels + "cd" * levels)]


PLAIN = st.text("abc é漢.,!\n", min_size=1, max_size=12).filter(lambda text: any(map(str.isalpha, text)))
NOISE = st.one_of(
    PLAIN.map(lambda text: (text, [])),
    PLAIN.map(lambda text: (f"<<Example>>{text}<</Example>>", [])),
    PLAIN.map(lambda text: (f"{text}<</Nonsense>>", [])),
    st.just(("<<Style>> <</Style>>", [])),
)
OPENERS = ["<<{}>>", "<<{} >>", "<<{}s>>"]
CLOSERS = ["<</{}>>", "<<//{}>>", "<</ {}>>", "<</{}s>>", "<<{}/>>", "<<{}>>"]
VALID = st.tuples(st.sampled_from(TAGS), PLAIN, st.sampled_from(OPENERS), st.sampled_from(CLOSERS)).map(
    lambda drawn: (
        drawn[2].format(drawn[0]) + drawn[1] + drawn[3].format(drawn[0]),
        [(drawn[0], drawn[1].strip())],
    )
)


@settings(max_examples=300, deadline=None)
@given(st.lists(VALID | NOISE, max_size=12))
def test_only_valid_phrases_are_kept_among_noise(pieces: list[tuple[str, list[tuple[str, str]]]]) -> None:
    expected = [phrase for _, valid in pieces for phrase in valid]
    expected.sort(key=lambda phrase: TAGS.index(phrase[0]))
    assert phrases("".join(text for text, _ in pieces)) == expected


def test_a_message_can_be_built_by_hand() -> None:
    assert TaggedMessage((Phrase("Role", "r"),)) == parse("<<Role>>r<</Role>>")


SAID = {
    "as asked": (
        "<<Role>>: Good\n<<Tool>>: None\n<<Content>>: Bad",
        {"Role": "Good", "Content": "Bad", "Tool": "None"},
    ),
    "on one line": ("<<Role>>: Good <<Task>>: Bad", {"Role": "Good", "Task": "Bad"}),
    "with a reason": ("<<Role>>: Good - it fits.\n<<Task>>: bad, as it is empty", {"Role": "Good", "Task": "Bad"}),
    "as a list": ("1. **<<Roles>>**: **Good**\n- <<task >> - BAD.", {"Role": "Good", "Task": "Bad"}),
    "without brackets": ("Role: Good\n* **Tool**: None", {"Role": "Good", "Tool": "None"}),
    "as a tag": ("<<Role>>Good<</Role>> <<Task>>: <<Bad>>", {"Role": "Good", "Task": "Bad"}),
    "behind the phrase": ("<<Role>>a nurse<</Role>>: Good", {"Role": "Good"}),
    "twice the same": ("<<Role>>: Good\n<<Role>>: good", {"Role": "Good"}),
    "twice, not the same": ("<<Role>>: Good\n<<Role>>: Bad", {}),
    "the question": ("<<Role>>: Good/Bad/None\n<<Task>>: Good or Bad", {}),
    "a sentence": ("<<Role>>: None of them is good\n<<Task>>: not good\n<<Style>>: Goodness", {}),
    "on the next line": ("<<Role>>:\nGood", {"Role": "Good"}),
    "of another tag": ("<<Example>>: Good", {}),
    "nothing": ("", {}),
}


@pytest.mark.parametrize(("text", "expected"), SAID.values(), ids=SAID)
def test_verdicts(text: str, expected: dict[str, str]) -> None:
    assert parse_verdicts(text).of == expected


def test_unreadable_verdicts_are_reported() -> None:
    said = parse_verdicts("<<Role>>: Good\n<<Role>>: Bad\n<<Task>>: Good/Bad\n<<Example>>: Good\n<<style>>: Good")
    assert sorted((dropped.tag, dropped.reason) for dropped in said.dropped) == [
        ("Example", "none of the eight tags"),
        ("Role", "verdicts that contradict each other"),
        ("Task", "several verdicts at once"),
    ]
    assert said.repairs == {"written otherwise": 1}


VERDICT_LINE = st.tuples(st.sampled_from(TAGS), st.sampled_from(["Good", "Bad", "None"]))


@given(st.lists(VERDICT_LINE, unique_by=lambda line: line[0]), st.sampled_from(["\n", " ", "\n\n", ", "]))
def test_all_verdicts_in_the_prompts_form_are_parsed(lines: list[tuple[str, str]], between: str) -> None:
    assert parse_verdicts(between.join(f"<<{tag}>>: {verdict}" for tag, verdict in lines)).of == dict(lines)


@settings(max_examples=200, deadline=None)
@given(ANYTHING | st.lists(st.one_of(MARK, WORD, st.sampled_from(["Good", "bad", ": ", "/", "None"]))).map("".join))
def test_no_text_makes_the_parsing_of_verdicts_fail(text: str) -> None:
    assert set(parse_verdicts(text).of) <= set(TAGS)
