"""Pieces: the fixed texts that a template writes around the contents of messages, learnt once per sequence of roles.

    <|im_start|>user\\n CONTENT <|im_end|>\\n<|im_start|>assistant\\n CONTENT <|im_end|>\\n

Most templates write contents unchanged, between texts that follow from the roles. Then a row is its contents joined
with these pieces, which is many times faster than running the template. A template is a program, though, and may look
into contents. So

- the pieces come from complete, verified renders of two conversations with the roles of the row, one with short
  contents and one with long ones of many lines. They must be the same for both;
- a row is joined only where its messages have nothing but a role and a content, the contents differ, none begins or
  ends with white space, which templates strip, and none has a text that the template tests for or splits at
  (`find_tested_texts`);
- the first row of each sequence of roles and one row in `CHECK_EVERY` are rendered by the template too and compared.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import jinja2
from jinja2 import nodes

from train.data.chat.rendering import Rendering, ShortcutError, Span
from train.data.chat.template import without_generation_marks
from train.data.sources.formats import Message, RowError

CHECK_EVERY = 100
"""One joined row in this many is rendered by the template too and compared."""
_MOST_SHAPES = 10_000
"""Sequences of roles whose pieces are kept in memory."""
_PLAIN_KEYS = {"role", "content"}
_LONG = "".join(f"\n{number}. A line, 'quoted' (and \"quoted\"), with a mark: *.\n" for number in range(40)) + "end"


@dataclass(frozen=True, slots=True)
class Pieces:
    """The texts before, between and after the contents of messages, and the borders of the trained spans.

    `borders`: a piece's number and the characters of it before the border, for each start and end in turn.
    """

    texts: tuple[str, ...]
    borders: tuple[tuple[int, int], ...]

    def join(self, contents: Sequence[str]) -> Rendering:
        """Return the rendering of a conversation with these contents."""
        parts = [*chain.from_iterable(zip(self.texts, contents, strict=False)), self.texts[-1]]
        starts = [0, *accumulate(map(len, parts))]
        positions = [starts[2 * piece] + offset for piece, offset in self.borders]
        return Rendering("".join(parts), list(zip(positions[::2], positions[1::2], strict=True)))


class PieceJoiner:
    """Joins rows of pieces under one template, and learns the pieces of each sequence of roles at its first row."""

    def __init__(self, template: str, render: Callable[[list[Message]], list[Rendering]]) -> None:
        """`render`: returns the rows of a conversation by the template, each verified. It may raise RowError."""
        self._render = render
        self._equal, self._inside = find_tested_texts(template)
        self._pieces: dict[tuple[str, ...], Pieces | None] = {}
        self._joined = 0

    def join(self, messages: list[Message]) -> Rendering | None:
        """Return the row of a conversation; None where the template itself must render it.

        Raises ShortcutError if the template gives another row.
        """
        contents = [message["content"] for message in messages if message.keys() == _PLAIN_KEYS]
        if len(set(contents)) < len(messages) or not all(map(self._is_plain, contents)):
            return None
        roles = tuple([message["role"] for message in messages])
        if roles not in self._pieces:
            if len(self._pieces) >= _MOST_SHAPES:
                return None
            self._pieces[roles] = self._learn(roles)
            self._joined = 0  # compare this row
        pieces = self._pieces[roles]
        if pieces is None:
            return None
        row = pieces.join(contents)
        if self._joined % CHECK_EVERY == 0:
            self._compare(messages, row)
        self._joined += 1
        return row

    def _is_plain(self, content: str) -> bool:
        """Return whether the template can't write a content otherwise than others."""
        return (
            content != ""
            and not (content[0].isspace() or content[-1].isspace())
            and content not in self._equal
            and not any(text in content for text in self._inside)
        )

    def _learn(self, roles: Sequence[str]) -> Pieces | None:
        """Return the pieces of a sequence of roles; None if the template doesn't render it from fixed pieces."""
        learnt = []
        for more in ("", _LONG):
            contents = [f"\ue000{number}{more}\ue001" for number in range(len(roles))]
            messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            try:
                rows = self._render(messages)
            except RowError:
                return None
            learnt.append(_cut(rows[0], contents) if len(rows) == 1 else None)
        return learnt[0] if learnt[0] == learnt[1] else None

    def _compare(self, messages: list[Message], row: Rendering) -> None:
        """Raise ShortcutError unless the template gives this row."""
        try:
            same = self._render(messages) == [row]
        except RowError:
            same = False
        if not same:
            raise ShortcutError(f"the template writes {messages[-1]['content'][:60]!r} in its own way")


def _cut(row: Rendering, contents: Sequence[str]) -> Pieces | None:
    """Return the pieces of a rendering; None if it doesn't hold each content once and in order."""
    texts: list[str] = []
    starts: list[int] = []
    end = 0
    for content in contents:
        start = row.text.find(content, end)
        if start < 0 or row.text.count(content) != 1:
            return None
        texts.append(row.text[end:start])
        starts.append(end)
        end = start + len(content)
    pieces: list[Span] = [*zip(starts, map(len, texts), strict=True), (end, len(row.text) - end)]
    borders = []
    for position in chain.from_iterable(row.spans):
        holding = [number for number, (start, size) in enumerate(pieces) if start <= position <= start + size]
        if not holding:
            return None
        borders.append((holding[0], position - pieces[holding[0]][0]))
    return Pieces((*texts, row.text[end:]), tuple(borders))


def find_tested_texts(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the literal texts by which a template may tell contents apart.

    First those that it compares a value with (`==`, `in [...]`), then those that it looks for inside of values or gives
    to functions, methods and filters. Not the names of keys (`message.get('role')`, `selectattr('role', ...)`), and not
    the white space that it strips.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    tree = environment.parse(without_generation_marks(template))
    equal: set[str] = set()
    inside: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        for item in compare.ops:
            whole = _is_value(compare.expr) or _is_value(item.expr)
            of_equality = item.op in ("eq", "ne") or isinstance(item.expr, nodes.List | nodes.Tuple)
            group = equal if whole and of_equality else inside
            group |= {*_literals(compare.expr), *_literals(item.expr)}
    calls: list[nodes.Call | nodes.Filter | nodes.Test] = [*tree.find_all(nodes.Call), *tree.find_all(nodes.Filter)]
    for call in [*calls, *tree.find_all(nodes.Test)]:
        name = getattr(call.node, "attr", "") if isinstance(call, nodes.Call) else call.name
        if name not in ("get", "selectattr", "rejectattr"):
            strips = name in ("strip", "lstrip", "rstrip", "trim")
            texts = {text for argument in call.args for text in _literals(argument)}
            inside |= {text for text in texts if not (strips and text.isspace())}
    return frozenset(equal), frozenset(inside - {""})


def _is_value(node: nodes.Node) -> bool:
    """Return whether an expression is a value as it is: a variable, or an item by its key, not a part of a text."""
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
    return isinstance(node, nodes.Name | nodes.Getattr)


def _literals(node: nodes.Node) -> Iterator[str]:
    """Yield the literal texts of an expression, except keys of items and what it compares on its own."""
    if isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.value
    if not isinstance(node, nodes.Compare):
        for child in [node.node] if isinstance(node, nodes.Getitem) else node.iter_child_nodes():
            yield from _literals(child)
