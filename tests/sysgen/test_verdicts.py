"""Verdicts on tags, in the forms in which models write them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.sysgen.tags import TAGS, parse_verdicts
from train.sysgen.verdicts import PLACEHOLDER_VERDICTS, parse_reply_verdicts

THREE = {"Role": "Good", "Task": "Bad", "Tool": "None"}

READ = {
    "a numbered list": "1. Role: Good\n3. Task: Bad\n7. Tool: None",
    "numbers in brackets": "(1) Role: Good\n(3) Task: Bad\n(7) Tool: None",
    "numbers without a dot": "1) Role: Good\n3) **Task**: Bad\n7) `Tool`: None",
    "letters": "a) Role: Good\nb) Task: Bad\nc. Tool: None",
    "a reason with because": "<<Role>>: Good because it names a profession.\n<<Task>>: Bad because it is a style.\n"
    "<<Tool>>: None because no tool is named.",
    "a reason with as, since, due to": "Role: Good as it names a profession\nTask: Bad since it is a style\n"
    "Tool: None due to its absence",
    "a reason with but": "Role: Good but short\nTask: Bad although it is close\nTool: None",
    "a table": "| Tag | Verdict |\n|---|---|\n| Role | Good |\n| Task | Bad |\n| Tool | None |",
    "a table with reasons": "| Tag | Verdict | Reason |\n|:--|:-:|---|\n| Role | Good | it fits |\n"
    "| **Task** | **Bad** | a style |\n| <<Tool>> | None | missing |",
    "a table with numbers and phrases": "| # | Tag | Phrase | Verdict |\n|---|---|---|---|\n"
    "| 1 | Role | You are a teacher. | Good |\n| 3 | Task | Be brief. | Bad |\n| 7 | Tool | | None |",
    "a table without outer lines": "Tag | Verdict\n--- | ---\nRole | Good\nTask | Bad\nTool | None",
    "dashes": "**Role** - Good\n**Task** – Bad\nTool — None",
    "a flat object": '{"Role": "Good", "Task": "Bad", "Tool": "None"}',
    "fenced JSON": '```json\n{\n  "Role": "Good",\n  "Task": "Bad",\n  "Tool": "None"\n}\n```',
    "JSON behind a sentence": 'Here are the verdicts:\n\n{"Role": "Good", "Task": "Bad", "Tool": "None"}\n\nDone.',
    "JSON with tags": '{"<<Role>>": "Good", "<<Task>>": "Bad", "<<Tool>>": "None"}',
    "nested JSON": json.dumps(
        {"Role": {"reason": "a role", "verdict": "Good"}, "Task": {"verdict": "Bad"}, "Tool": {"verdict": "None"}},
        indent=1,
    ),
    "JSON below a key": json.dumps({"verdicts": {"Role": "Good", "Task": "Bad", "Tool": "None"}}, indent=2),
    "a list of objects": json.dumps(
        [
            {"tag": "Role", "verdict": "Good", "why": "x"},
            {"tag": "Task", "verdict": "Bad"},
            {"tag": "Tool", "verdict": "None"},
        ],
        indent=2,
    ),
    "a line of JSON each": '{"tag": "Role", "verdict": "Good"}\n{"tag": "Task", "verdict": "Bad"}\n'
    '{"tag": "Tool", "verdict": "None"}',
    "a Python dict": "{'Role': 'Good', 'Task': 'Bad', 'Tool': 'None'}",
    "JSON with a comma too many": '{"Role": "Good",\n"Task": "Bad",\n"Tool": "None",}',
    "bold lines": "**Role: Good**\n**Task: Bad**\n**Tool: None**",
    "headings": "### Role: Good\n### Task: Bad\n### Tool: None",
    "equals signs": "Role = Good\nTask == Bad\nTool=None",
    "arrows": "Role -> Good\nTask → Bad\nTool => None",
    "brackets": "Role (Good)\nTask (Bad)\nTool [None]",
    "nothing but a blank": "Role Good\n- Task  Bad\nTool\tNone",
    "a verb": "Role is Good.\nTask is judged Bad because it is a style.\nThe Tool tag is None.",
    "other case": "ROLE: GOOD\ntask: bad\nTool: none",
    "a sentence to a verdict": "Role: Good. It names a profession.\nTask: Bad. It is a style.\nTool: None.",
    "one line": "Role: Good, Task: Bad, Tool: None",
    "one line of sentences": "Role: Good. Task: Bad. Tool: None.",
    "one line with semicolons": "Role - Good; Task - Bad; Tool - None",
    "one line with bars": "Role: Good | Task: Bad | Tool: None",
    "single angle brackets": "<Role>: Good\n<Task>: Bad\n<Tool>: None",
    "XML": "<Role>Good</Role>\n<Task>Bad</Task>\n<Tool>None</Tool>",
    "XML on one line": "<Role>Good</Role><Task>Bad</Task><Tool>None</Tool>",
    "escaped brackets": "&lt;&lt;Role&gt;&gt;: Good\n&lt;&lt;Task&gt;&gt;: Bad\n&lt;&lt;Tool&gt;&gt;: None",
    "square brackets": "[Role]: Good\n[Task]: Bad\n[Tool]: None",
    "guillemets": "«Role»: Good\n«Task»: Bad\n«Tool»: None",
    "full-width colons": "Role：Good\nTask： Bad\nTool ：None",
    "the word verdict": "Role - Verdict: Good\nTask: the verdict is Bad\nTag: Tool, Verdict: None",
    "the phrase in quotes": 'Role: "You are a teacher." - Good\nTask ("Be brief."): Bad\n- Tool (no phrase): None',
    "signs": "✅ Role: Good\n❌ Task: ❌ Bad\n➖ Tool: None",
    "by verdict": "Good: Role\nBad: Task\nNone: Tool",
    "by verdict, with a list each": "**Good**: Role, <<Role>>\n- Bad - Tasks\nNone: `Tool` and Tool",
    "JSON by verdict": '{"Good": ["Role"],\n "Bad": ["Task"],\n "None": ["Tool"]}',
    "a heading, and a line": "### Role\nGood\n\n### Task\nBad - a style\n\n### Tool\nNone",
    "a heading with a colon, and a sentence": "**Role:**\nGood. It fits.\n**Task:**\nBad, as it is a style.\n**Tool:**\nNone.",
    "numbers, and a line": "1. Role\n   Good\n2. Task\n   Bad\n3. Tool\n   None",
    "a list below": "- **Role**:\n  - Verdict: Good\n  - Reason: it fits\n- **Task**:\n  - Verdict: Bad\n- **Tool**:\n  - Verdict: None",
    "the phrase, then the verdict": "**Role**: You are a teacher.\n**Verdict**: Good\n\n**Task**: Be brief.\n**Verdict**: Bad\n\n"
    "**Tool**: no phrase\n**Verdict**: None",
    "a reason, then the verdict": "### Role\nIt names a profession.\nVerdict: **Good**\n### Task\nA style.\nJudgment: Bad\n"
    "### Tool\nMissing.\nFinal verdict: None",
    "the tagged phrase, then the verdict": "<<Role>>You are a teacher.<</Role>>\nGood\n<<Task>>Be brief.<</Task>>\nBad\n"
    "<<Tool>><</Tool>>\nNone",
    "the phrase without quotes": "Role: You are a teacher. - Good\nTask: Be brief. (Bad)\n**Tool**: no phrase → None",
    "by verdict, in lists": "Good:\n- Role\nBad:\n- Task\n\nNone:\n- Tool",
    "by verdict, under headings": "### Good\n- **Role**\n\n### Bad\n- <<Task>>\n\n### None\n- Tool",
    "one line with slashes": "Role: Good / Task: Bad / Tool: None",
    "a match": "Role: Good match\nTask: Bad fit\nTool: None",
    "windows lines": "Role: Good\r\nTask: Bad\r\nTool: None\r\n",
}

UNREAD = {
    "several verdicts": "Role: Good/Bad\nTask: **Good** or **Bad**\nTool: Good, Bad or None\nStyle | Good | Bad |",
    "a choice in JSON": '{"Role": "Good|Bad|None"}',
    "an adjective": "Role: Good use of the tag\nTask: Bad phrase\nStyle: none of the phrases is off",
    "a condition": "Role: Good if the user is a child\nTask: Bad as long as it says that",
    "a negation": "Role: not Good\nTask: isn't bad\nTool is not None",
    "words of its own": "Role: OK\nTask: Yes\nTool: N/A\nStyle: ✓",
    "a cell for each verdict": "| Tag | Good | Bad | None |\n|---|---|---|---|\n| Role | x | | |\n| Task | | x | |",
    "tags as columns": "| Role | Task | Tool |\n|---|---|---|\n| Good | Bad | None |",
    "no tag": "Good\nBad\nNone\n1. Good\n2. Bad",
    "prose": "The role is fine and the task is bad for a teacher, so none of them stays.",
    "a tag of a tag": "Roleplay: Good\nTasking: Bad\nmy tool: None",
    "null": '{"Role": null, "Task": true, "Tool": 1}',
    "two in an object": '{"Role": {"first": "Good", "second": "Bad"}}',
    "JSON that contradicts itself": '{"Role": "Good", "Role": "Bad"}',
    "a verdict under no tag of its own": "Role: You are a teacher.\nIt is what it is.\nGood\n### Style of the answer\nBad",
    "a negated phrase": "Role: not a teacher, and so not - Good\nTask: isn't clear (Bad)",
    "two verdicts below a tag": "### Role\nVerdict: Good\nVerdict: Bad",
    "by verdict, and contradictory": "Good: Role, Task\nBad: Role, Task",
}


@pytest.mark.parametrize("text", READ.values(), ids=READ)
def test_forms_that_are_parsed(text: str) -> None:
    assert parse_verdicts(text).of == THREE


@pytest.mark.parametrize("text", UNREAD.values(), ids=UNREAD)
def test_forms_that_are_not_parsed(text: str) -> None:
    assert parse_verdicts(text).of == {}


def test_a_table_of_issues_gives_no_verdict() -> None:
    assert parse_verdicts("| Role | Good | no issues |\n| Task | Bad | Role |").of == {"Role": "Good", "Task": "Bad"}


def test_tags_get_no_verdict_from_their_neighbours() -> None:
    text = "Good: Role, Style\nBad: Content, None: Tool\nTask:\nStyle, Background: fine\nAction, Bad"
    assert parse_verdicts(text).of == {"Role": "Good", "Style": "Good"}


@pytest.mark.parametrize("form", ["<<{}>>: {}", "- {}: {}"])
def test_a_reply_that_repeats_the_prompts_own_form_judges_nothing(form: str) -> None:
    text = "\n".join(form.format(tag, verdict) for tag, verdict in PLACEHOLDER_VERDICTS.items())
    assert parse_reply_verdicts(text).of == {}
    assert parse_verdicts(text).of == PLACEHOLDER_VERDICTS


def test_each_tag_in_another_form_counts_once() -> None:
    text = '<<Role>>: Good\n```json\n{"Task": "Bad", "Tool": {"verdict": "None"}}\n```\nTask: Bad'
    assert parse_verdicts(text).of == THREE
    assert parse_verdicts(text).repairs == {"written otherwise": 2}


LINES = st.lists(
    st.tuples(st.sampled_from(TAGS), st.sampled_from(["Good", "Bad", "None"])), unique_by=lambda pair: pair[0]
)
FORMS = ["{}: {}", "- **{}** - {}", "{} = {}", "| {} | {} | why |", "1. {}: {} because so", "{} ({})", "<{}>{}</{}>"]


@settings(max_examples=60, deadline=None)
@given(LINES, st.sampled_from(FORMS))
def test_every_tag_is_parsed_with_every_verdict(lines: list[tuple[str, str]], form: str) -> None:
    text = "\n".join(form.format(tag, verdict, tag) for tag, verdict in lines)
    assert parse_verdicts(text).of == dict(lines)


@settings(max_examples=60, deadline=None)
@given(LINES, st.sampled_from([None, 2]))
def test_json_of_every_layout_is_parsed(lines: list[tuple[str, str]], indent: int | None) -> None:
    for value in (dict(lines), [{"tag": tag, "verdict": verdict} for tag, verdict in lines], {"all": dict(lines)}):
        assert parse_verdicts(f"Verdicts:\n{json.dumps(value, indent=indent)}").of == dict(lines)


def test_long_texts_are_parsed_quickly() -> None:
    for piece in ("[", '{"', "| Role ", "Role (", 'Role: "', "Role: Good,", "<<Role>> ", "Good: Role, ", "- ", "1. "):
        parse_verdicts(piece * 10_000)
