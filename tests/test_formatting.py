"""Wrapped lines, shortened texts and visible control characters."""

import unicodedata

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from train.formatting import shorten, wrap

SENTENCE = (
    "row length percentiles (tokens): min 32, p5 39, p25 45, p50 48, p75 53, p95 60, p99 67, max 79, and the longest "
    "row is recipes/smollm2-135m/data/train.jsonl:369, of 618"
)
JAPANESE = "システムメッセージは会話の最初に置かれます。モデルはそれに従います。" * 6


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("text", [SENTENCE, JAPANESE, f"{SENTENCE} {JAPANESE}", "Ünïcödé wörds " * 30])
def test_lines_are_wrapped_at_words_with_a_hanging_indent(text: str, width: int) -> None:
    first, *others = wrap(text, width, 12).split("\n")
    assert cell_len(first) <= width - 12
    assert all(line.startswith(" " * 14) and line[14] != " " and cell_len(line) <= width for line in others)
    assert "".join([first, *others]).replace(" ", "") == text.replace(" ", "")
    words = {word for word in text.split() if cell_len(word) <= width - 14}
    assert words <= {*first.split(), *(word for line in others for word in line.split())}


def test_lines_without_indent_are_those_of_rich() -> None:
    """Rich wraps at words too, without an indent."""
    for width in (60, 80, 120):
        lines = Text(SENTENCE).wrap(Console(width=width), width)
        assert wrap(SENTENCE, width, 0, hanging=0) == "\n".join(line.plain.rstrip() for line in lines)


def test_paths_are_never_broken_and_full_stops_stay_with_wide_characters() -> None:
    path = "/scratch/" + "deep-folder/" * 12 + "rows.jsonl:3"
    assert path in wrap(f"first {path} of 3 rows", 60, 12).split()
    for width in range(40, 60):
        assert all(line.strip()[0] not in "。、" for line in wrap(JAPANESE, width, 4).split("\n"))
    assert wrap("a\nb", 80, 4) == "a\n      b"


def test_texts_are_cut_between_words_and_never_within_a_character() -> None:
    words = "".join(f"word{number} " for number in range(2_000))
    start, _, end = shorten(words, 500, 100).partition(" [... ")
    assert words.startswith(start)
    assert words[len(start) - 1] == " "
    end = end.partition(" characters ...] ")[2]
    assert words.endswith(end)
    assert end.startswith("word")
    assert 460 < len(start) + len(end) <= 540
    for mark in ("e\u0301", "か\u3099", "👨\u200d👩\u200d👧", "n\u0303\u0323"):
        for room in range(100, 108):
            shown = shorten("x" + mark * 500, room)
            before, _, after = shown.partition(" [... ")
            after = after.partition("] ")[2]
            assert before.removeprefix("x").replace(mark, "") == after.replace(mark, "") == ""
            omitted = int(shown.split(" [... ")[1].split()[0].replace(",", ""))
            assert len(before) + omitted + len(after) == 1 + len(mark) * 500
            assert not unicodedata.combining(after[0])
