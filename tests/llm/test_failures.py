"""Counts of failed requests by kind."""

from train.llm.failures import KINDS, FailureReasons, to_table_cells


def test_messages_that_differ_in_numbers_are_one_kind_shown_by_the_first() -> None:
    reasons = FailureReasons()
    for message in (
        "500 Oops: no (6 times)",
        "400 Bad Request: you requested 4203 tokens (request req_7f3a)",
        "400 Bad Request: you requested 99 tokens (request req_b2)",
        "400 Oops: no (6 times)",
        "400 Bad Request: you requested 5 tokens\n (request req_c1)",
        "can't be sent",
    ):
        reasons.add(message)
    assert reasons.counts() == {
        "400 Bad Request: you requested 4203 tokens (request req_7f3a)": 3,
        "500 Oops: no (6 times)": 1,
        "400 Oops: no (6 times)": 1,
        "can't be sent": 1,
    }
    assert reasons.lines(2) == [
        "3 times: 400 Bad Request: you requested 4203 tokens (request req_7f3a)",
        "1 times: 500 Oops: no (6 times)",
        "2 times: something else (2 kinds)",
    ]
    assert FailureReasons().lines() == []


def test_neither_kinds_nor_lines_grow_without_end() -> None:
    reasons = FailureReasons()
    for number in range(3_000):
        letters = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        reasons.add(f"400 Bad Request: {letters} " + "x y " * 100)
    counts = reasons.counts()
    assert len(counts) == KINDS + 1
    assert sum(counts.values()) == 3_000
    assert counts["other messages"] == 3_000 - KINDS
    assert max(map(len, reasons.lines())) < 250
    assert len(reasons.lines()) == 4


def test_cells_of_a_report_are_text_and_no_markup() -> None:
    counts = {f"<h1>`{number}`</h1>": 30 - number for number in range(30)}
    cells = to_table_cells(counts)
    assert next(iter(cells.items())) == ("`<h1>'0'</h1>`", 30)
    assert len(cells) == 10
