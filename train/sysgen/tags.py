"""Parser for system messages whose phrases are in tags, as models write them.

    <<Role>>You are a seasoned nurse.<</Role>> <<Style>>Be warm and brief.<</Style>>

`parse` keeps the phrases in properly matched tags of the eight and drops all other text (step 2 of SYSGEN, section 3.2
of arXiv:2502.11330). Unambiguous errors are repaired and counted; ambiguous text is dropped with the reason. Rules:

- `<<Role>>a<<Role>>`: the second tag closes the first, unless it is closed itself by `<</Role>>`.
- A phrase with another tag's phrase inside: both are kept if the rest of the outer one is in one piece. Otherwise the
  outer one keeps the complete text, and the inner one is no phrase of its own.
- A phrase with an unmatched or unknown tag inside is dropped. Properly matched phrases inside it are kept.
- `<<Role>>: a<</Role>>`: the colon is removed, and so is emphasis around the tags, as in `**<<Role>>**`.
- A phrase without content (`None`, `Not specified.`, `No tools are needed.`, `...`), which models write to fill in all
  eight tags, is dropped, and so is the prompt's placeholder.
- Control tokens at the end of a phrase are removed: `<<Role>>a<|im_end|><</Role>>`.
- Tags in code (between backticks or code fences) are part of the phrase around them. Code fences around complete
  phrases, as when a model fences its complete reply, are ignored.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from train.llm.reasoning import strip_end_tokens
from train.sysgen.tag_names import NAMES, TAGS, DroppedText
from train.sysgen.verdicts import Verdict, Verdicts, parse_verdicts

__all__ = ["TAGS", "DroppedText", "Phrase", "TaggedMessage", "Verdict", "Verdicts", "parse", "parse_verdicts"]

_MARK = re.compile(
    r"<<[^\S\n]*(?P<before>[/\\]*)[^\S\n]*(?P<name>[^\W\d_][\w \t-]{0,39}?)[^\S\n]*(?P<after>[/\\]*)[^\S\n]*>>"
)
"""Anything that looks like a tag, unlike `x << 2 >> y` and `<<"here">>`."""

_CODE = re.compile(
    r"(?:^|\n)[^\S\n]*(?P<fence>`{3,}|~{3,})[^\n]*\n(?:.*?\n)?[^\S\n]*(?P=fence)[`~]*[^\S\n]*(?=\n|$)"
    r"|(?<!`)(?P<ticks>`+)(?!`)[^\n]*?(?<!`)(?P=ticks)(?!`)",
    re.DOTALL,
)
"""Fenced code, and code between equally long runs of backticks on one line, as in CommonMark."""

_COLON = re.compile(r"(?:[:：](?:\s+|$)|：)+")
_AROUND = (("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"), ("<", ">"))
"""Marks that models put around a tag: `**<<Role>>**`, `<<<Role>>>`."""

_NEEDED = (
    r"(?:needed|required|specified|necessary|applicable|provided|given|mentioned|used|stated|available|relevant"
    r"|indicated|included|identified|implied|found)"
)
_ABOUT = (
    r"(?:tools?|roles?|tasks?|actions?|styles?|formats?|formatting|content|background|context|information|details?"
    r"|instructions?|requirements?|constraints?|preferences?|phrases?)"
)
_EMPTY_PHRASE = re.compile(
    rf"""\W*(?:(?:n[/.]?a|null|nil|blank|empty|unspecified|tbd|phrase|(?:your|the|insert|some)\ phrase(?:\ here)?)
    | (?:none|nothing|not)? (?:\s*(?:is|are|was|were|at\ all|here|(?:in\ )?particular|specific(?:ally)?|explicitly))*
      (?:\s*{_NEEDED})?
    | (?:there\ (?:is|are)\ )? no \s (?:\w+\s){{0,2}}? {_ABOUT} (?:\s\w+)? (?:\s(?:is|are|was|were))? \s {_NEEDED}
    | (?:there\ (?:is|are)\ )? no \s (?:specific|particular|special|additional|external|extra|further) \s \w+
    | keine?|aucune?|ningun[oa]|nessun[oa]|无|無|なし|нет
    )(?:\s(?:for|in|by|here)\b [\w ,'’]{{0,60}})?\W*""",
    re.IGNORECASE | re.VERBOSE,
)
"""`None`, `Not specified.`, `No specific tools are needed.`, `(empty)`, `...`, and the placeholder `phrase`."""
_MAX_EMPTY_PHRASE = 120
"""Characters of a phrase that `_EMPTY_PHRASE` is tried on."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """A piece of a system message and its tag."""

    tag: str
    text: str


@dataclass(frozen=True)
class TaggedMessage:
    """A system message as phrases in canonical order. Comparisons ignore repairs and dropped text."""

    phrases: tuple[Phrase, ...]
    repairs: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Number of repairs by kind, including those in dropped phrases."""
    dropped: tuple[DroppedText, ...] = field(default=(), compare=False)

    @property
    def text(self) -> str:
        """The plain system message: the phrases joined by blanks."""
        return " ".join(phrase.text for phrase in self.phrases)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the phrases, each once, in canonical order."""
        return tuple(tag for tag in TAGS if any(phrase.tag == tag for phrase in self.phrases))

    def render(self) -> str:
        """Return the phrases in their tags, one per line."""
        return "\n".join(f"<<{phrase.tag}>>{phrase.text}<</{phrase.tag}>>" for phrase in self.phrases)

    def with_phrases(self, phrases: Iterable[Phrase]) -> "TaggedMessage":
        """Return the message with further phrases, each behind those of its tag."""
        together = sorted((*self.phrases, *phrases), key=lambda phrase: TAGS.index(phrase.tag))
        return TaggedMessage(tuple(together), self.repairs, self.dropped)

    def without(self, tags: Collection[str], reason: str) -> "TaggedMessage":
        """Return the message without the phrases of some tags, which join the dropped texts."""
        dropped = tuple(DroppedText(phrase.tag, phrase.text, reason) for phrase in self.phrases if phrase.tag in tags)
        kept = tuple(phrase for phrase in self.phrases if phrase.tag not in tags)
        return TaggedMessage(kept, self.repairs, self.dropped + dropped)


@dataclass(slots=True)
class _Mark:
    """A tag in the text. `name`: the canonical name, or the invented one."""

    start: int
    end: int
    name: str
    closes: bool
    repairs: tuple[str, ...]

    @property
    def is_valid(self) -> bool:
        return self.name in TAGS


@dataclass(slots=True)
class _Pair:
    """An opening tag and its closing tag, with the pairs directly inside."""

    opener: _Mark
    closer: _Mark
    inside: list["_Pair"] = field(default_factory=list)


def parse(text: str) -> TaggedMessage:
    """Return the phrases of a message that a model wrote. Never raises; `parse(parse(x).render()) == parse(x)`."""
    marks = _remove_code(text, list(_find_marks(text)))
    pairs, unmatched = _match_marks(marks)
    reading = _Reading(text)
    unread = _nest_pairs(pairs)[::-1]
    while unread:  # no recursion: a model that repeats itself nests hundreds of tags
        unread += reading.read(unread.pop())[::-1]
    reading.drop_rest(pairs, unmatched)
    repairs = Counter(repair for mark in marks for repair in mark.repairs)
    repairs.update("opening tag as closer" for pair in pairs if not pair.closer.closes)
    repairs.update(reading.repairs)
    phrases = sorted(reading.phrases, key=lambda phrase: TAGS.index(phrase.tag))
    return TaggedMessage(tuple(phrases), dict(repairs), tuple(reading.dropped))


def _find_marks(text: str) -> Iterator[_Mark]:
    for match in _MARK.finditer(text):
        written = re.sub(r"\s+", " ", match["name"])
        name = NAMES.get(written.casefold(), written)
        repairs = []
        if name in TAGS:
            if written.casefold() != name.casefold():
                repairs.append("plural")
            if written[: len(name)] != name or written[len(name) :] not in ("", "s"):
                repairs.append("upper or lower case")
            if re.search(r"\s", match[0]):
                repairs.append("blanks inside")
            if (match["before"], match["after"]) not in (("", ""), ("/", "")):
                repairs.append("slashes")
        yield _Mark(match.start(), match.end(), name, bool(match["before"] or match["after"]), tuple(repairs))


def _remove_code(text: str, marks: list[_Mark]) -> list[_Mark]:
    """Return the marks that are not part of code in a phrase.

    A phrase extends from its opening tag to the next closing tag of its name. If every mark in between is in code that
    begins and ends in between, all of them are text.
    """
    if "`" not in text and "~~~" not in text:
        return marks
    kept = []
    number = 0
    while number < len(marks):
        opener = marks[number]
        kept.append(opener)
        number += 1
        if opener.closes or not opener.is_valid:
            continue
        following = range(number, len(marks))
        end = next((at for at in following if marks[at].closes and marks[at].name == opener.name), number)
        if end > number and _all_in_code(text[opener.end : marks[end].start], marks[number:end], opener.end):
            number = end
    return kept


def _all_in_code(phrase: str, marks: list[_Mark], offset: int) -> bool:
    code = [match.span() for match in _CODE.finditer(phrase)]
    return all(any(start <= mark.start - offset and mark.end - offset <= end for start, end in code) for mark in marks)


def _match_marks(marks: list[_Mark]) -> tuple[list[_Pair], list[_Mark]]:
    """Return the matched pairs and the unmatched marks.

    A closing tag matches the last open tag of its name. The open tags that it skips, and those at the end of the text,
    match each other if two of one name are adjacent.
    """
    pairs: list[_Pair] = []
    unmatched: list[_Mark] = []
    still_open: list[_Mark] = []

    def pair_up(openers: list[_Mark]) -> None:
        waiting: list[_Mark] = []
        for mark in openers:
            if waiting and waiting[-1].name == mark.name and mark.is_valid:
                pairs.append(_Pair(waiting.pop(), mark))
            else:
                waiting.append(mark)
        unmatched.extend(waiting)

    for mark in marks:
        if not mark.closes:
            still_open.append(mark)
            continue
        at = next((at for at in reversed(range(len(still_open))) if still_open[at].name == mark.name), None)
        if at is None:
            unmatched.append(mark)
        else:
            pairs.append(_Pair(still_open[at], mark))
            pair_up(still_open[at + 1 :])
            del still_open[at:]
    pair_up(still_open)
    return pairs, unmatched


def _nest_pairs(pairs: list[_Pair]) -> list[_Pair]:
    """Return the outermost pairs, each with those directly inside it."""
    outermost: list[_Pair] = []
    around: list[_Pair] = []
    for pair in sorted(pairs, key=lambda pair: pair.opener.start):
        while around and around[-1].closer.start < pair.opener.start:
            around.pop()
        (around[-1].inside if around else outermost).append(pair)
        around.append(pair)
    return outermost


class _Reading:
    """The kept phrases and dropped texts so far, in the order of the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.phrases: list[Phrase] = []
        self.dropped: list[DroppedText] = []
        self.repairs: Counter[str] = Counter()

    def read(self, pair: _Pair) -> list[_Pair]:
        """Keep a pair's phrase or drop it; return the pairs inside, unless the phrase includes their text."""
        name = pair.opener.name
        pieces = list(self._pieces(pair))
        own_text = "".join(pieces).strip()
        full = [piece for piece in pieces if piece.strip()]
        if not pair.opener.is_valid:
            self.dropped.append(DroppedText(name, own_text, "none of the eight tags"))
        elif not all(inner.opener.is_valid for inner in pair.inside):
            self.dropped.append(DroppedText(name, own_text, "a tag inside without a partner, or none of the eight"))
        elif len(full) > 1 and self._keep(pair, self._flatten(pair)):
            self.dropped += [
                DroppedText(inner.opener.name, self._between(inner).strip(), "part of the phrase around it")
                for inner in pair.inside
            ]
            return []
        elif len(full) > 1:
            self.dropped.append(DroppedText(name, own_text, "in pieces around other tags"))
        elif not own_text:
            if not pair.inside:
                self.dropped.append(DroppedText(name, "", "empty"))
        elif len(own_text) <= _MAX_EMPTY_PHRASE and own_text.strip(":：") and _EMPTY_PHRASE.fullmatch(own_text):
            self.dropped.append(DroppedText(name, own_text, "says nothing"))
        elif not self._keep(pair, own_text):
            has_marks = any(_find_marks(own_text))  # without, it was nothing but a colon or emphasis
            reason = "a tag inside without a partner, or none of the eight" if has_marks else "empty"
            self.dropped.append(DroppedText(name, own_text, reason))
        return pair.inside

    def _keep(self, pair: _Pair, text: str) -> bool:
        """Keep a text as a phrase, without marks of the tags around it; return whether it is one."""
        repairs = []
        for before, behind in _AROUND:
            opens = self.text.endswith(before, 0, pair.opener.start) and text.startswith(behind)
            closes = self.text.startswith(behind, pair.closer.end) and text.endswith(before)
            if before == behind and opens != closes and text.count(before) % 2 == 0:
                continue  # its counterpart is in the phrase
            if (opens and closes) or (before == behind and (opens or closes)):
                text = text[len(behind) * opens : len(text) - len(before) * closes].strip()
                repairs.append("marks around the tag")
        if colon := _COLON.match(text):
            text = text[colon.end() :].strip()
            repairs.append("colon behind the tag")
        text, tokens = strip_end_tokens(text)
        repairs += ["control tokens at the end"] * bool(tokens)
        if not _is_phrase(pair.opener.name, text):
            return False
        self.phrases.append(Phrase(pair.opener.name, text))
        self.repairs.update(repairs)
        return True

    def drop_rest(self, pairs: list[_Pair], unmatched: list[_Mark]) -> None:
        """Drop the text outside all pairs, and the unmatched tags."""
        covered = sorted((pair.opener.start, pair.closer.end) for pair in pairs)
        stops = sorted(unmatched, key=lambda mark: mark.start)
        at, tag, reason = 0, "", "outside any tag"
        for start, end in [*covered, (len(self.text), len(self.text))]:
            while stops and stops[0].start < max(start, at):
                mark = stops.pop(0)
                if mark.start < at:  # inside a pair, which was dropped because of it
                    continue
                self._drop_text(tag, self.text[at : mark.start], reason)
                at, tag = mark.end, mark.name
                reason = "closed and never opened" if mark.closes else "never closed"
            if start >= at:
                self._drop_text(tag, self.text[at:start], reason)
                tag, reason = "", "outside any tag"
            at = max(at, end)

    def _drop_text(self, tag: str, text: str, reason: str) -> None:
        if tag or text.strip():
            self.dropped.append(DroppedText(tag, text.strip(), reason))

    def _pieces(self, pair: _Pair) -> Iterator[str]:
        """Yield the parts of a pair's text outside the pairs inside it."""
        at = pair.opener.end
        for inner in pair.inside:
            yield self.text[at : inner.opener.start]
            at = inner.closer.end
        yield self.text[at : pair.closer.start]

    def _between(self, pair: _Pair) -> str:
        return self.text[pair.opener.end : pair.closer.start]

    def _flatten(self, pair: _Pair) -> str:
        """Return a pair's complete text without the marks inside; an empty text if one of them is invalid."""
        marks: list[_Mark] = []
        unseen = list(pair.inside)
        while unseen:
            inner = unseen.pop()
            if not inner.opener.is_valid:
                return ""
            marks += [inner.opener, inner.closer]
            unseen += inner.inside
        starts = [pair.opener.end, *sorted(mark.end for mark in marks)]
        ends = [*sorted(mark.start for mark in marks), pair.closer.start]
        return "".join(self.text[start:end] for start, end in zip(starts, ends, strict=True)).strip()


def _is_phrase(tag: str, text: str) -> bool:
    """Return whether a text can be a phrase: not empty, no marks except in code, and none that would close it."""
    marks = list(_find_marks(text))
    return bool(text) and _all_in_code(text, marks, 0) and not any(mark.closes and mark.name == tag for mark in marks)
