"""Diagnostics: lines of the reports about unread columns."""

import pytest

from train.data.diagnostics import describe_unread
from train.data.prepared_data import UnreadText


@pytest.mark.parametrize(
    ("name", "preview"),
    [
        ("", '""'),
        ("  ", '"  "'),
        ("messages[].", 'messages[].""'),
        ("index", "index"),
        ("messages[].note", "messages[].note"),
    ],
)
def test_a_column_without_a_name_is_shown_in_quotes(name: str, preview: str) -> None:
    """As pandas writes its index."""
    for ignored, note in ((False, "2 rows"), (True, "ignored, 2 rows")):
        unread = UnreadText("data.sources.0", name, rows=2, losing=0, ignored=ignored)
        assert describe_unread([unread]) == [f"data.sources.0: {preview} ({note})"]
