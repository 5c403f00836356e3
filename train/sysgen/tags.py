"""System messages whose phrases stand in tags, as models write them.

    <<Role>>You are a seasoned nurse.<</Role>> <<Style>>Be warm and brief.<</Style>>

`parse` keeps the phrases that stand in properly matched tags of the eight and drops the rest (step 2 of SYSGEN,
section 3.2 of arXiv:2502.11330). What models write wrongly and unambiguously is repaired and counted; what could be
meant in two ways is dropped and told, with the reason. The rules, where tags meet:

- `<<Role>>a<<Role>>`: the second one closes, unless it is itself closed by `<</Role>>`.
- A phrase with another tag's phrase inside: both stand, if what is left of the outer one is in one piece. Otherwise
  the outer one keeps the whole text, and the inner one is no phrase of its own.
- A phrase with a tag inside that has no partner or is none of the eight is dropped. What is properly matched within
  a dropped one stands.
- `<<Role>>: a<</Role>>`: the colon goes. So do marks that were set around the tags, as in `**<<Role>>**`.
- A phrase that says nothing (`None`, `Not specified.`, `No tools are needed.`, `...`), as where a model fills in all
  eight, is dropped. So is the prompt's placeholder.
- Control tokens at the end of a phrase are taken off: `<<Role>>a<|im_end|><</Role>>`.
- Tags in code (between backticks or code fences) are part of the phrase around it. Code around whole phrases, as
  where a model fences all it writes, is nothing.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from train.llm.reasoning.control_tokens import strip_end_tokens
from train.sysgen.tag_names import NAMES, TAGS, Dropped
from train.sysgen.verdicts import Verdict, Verdicts, parse_verdicts

__all__ = ["TAGS", "Annotated", "Dropped", "Phrase", "Verdict", "Verdicts", "parse", "parse_verdicts"]

_MARK = re.compile(
    r"<<[^\S\n]*(?P<before>[/\\]*)[^\S\n]*(?P<name>[^\W\d_][\w \t-]{0,39}?)[^\S\n]*(?P<after>[/\\]*)[^\S\n]*>>"
)
"""Whatever looks like a tag. `x << 2 >> y` and `<<"here">>` don't."""

_CODE = re.compile(
    r"(?:^|\n)[^\S\n]*(?P<fence>`{3,}|~{3,})[^\n]*\n(?:.*?\n)?[^\S\n]*(?P=fence)[`~]*[^\S\n]*(?=\n|$)"
    r"|(?<!`)(?P<ticks>`+)(?!`)[^\n]*?(?<!`)(?P=ticks)(?!`)",
    re.DOTALL,
)
"""Fenced code, and code between runs of backticks of one length on a line, as in CommonMark."""

_COLON = re.compile(r"(?:[:：](?:\s+|$)|：)+")
_AROUND = (("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"), ("<", ">"))
"""What models set around a tag: `**<<Role>>**`, `<<<Role>>>`."""

_NEEDED = (
    r"(?:needed|required|specified|necessary|applicable|provided|given|mentioned|used|stated|available|relevant"
    r"|indicated|included|identified|implied|found)"
)
_ABOUT = (
    r"(?:tools?|roles?|tasks?|actions?|styles?|formats?|formatting|content|background|context|information|details?"
    r"|instructions?|requirements?|constraints?|preferences?|phrases?)"
)
_SAYS_NOTHING = re.compile(
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
_LONGEST_NOTHING = 120
"""Characters."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """A piece of a system message and the tag it stands in."""

    tag: str
    text: str


@dataclass(frozen=True)
class Annotated:
    """A system message in phrases, in canonical order. How it was read counts for nothing when two are compared."""

    phrases: tuple[Phrase, ...]
    repairs: Mapping[str, int] = field(default_factory=dict, compare=False)
    """How often each kind of fault was repaired, in phrases that were kept or not."""
    dropped: tuple[Dropped, ...] = field(default=(), compare=False)

    @property
    def text(self) -> str:
        """The system message itself: the phrases joined by a blank."""
        return " ".join(phrase.text for phrase in self.phrases)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that occur, each once, in canonical order."""
        return tuple(tag for tag in TAGS if any(phrase.tag == tag for phrase in self.phrases))

    def render(self) -> str:
        """The phrases in their tags, a line to each."""
        return "\n".join(f"<<{phrase.tag}>>{phrase.text}<</{phrase.tag}>>" for phrase in self.phrases)

    def with_phrases(self, phrases: Iterable[Phrase]) -> "Annotated":
        """This message with further phrases, each behind those of its tag."""
        together = sorted((*self.phrases, *phrases), key=lambda phrase: TAGS.index(phrase.tag))
        return Annotated(tuple(together), self.repairs, self.dropped)

    def without(self, tags: Collection[str], reason: str) -> "Annotated":
        """This message without the phrases of some tags, which join what was dropped."""
        gone = tuple(Dropped(phrase.tag, phrase.text, reason) for phrase in self.phrases if phrase.tag in tags)
        kept = tuple(phrase for phrase in self.phrases if phrase.tag not in tags)
        return Annotated(kept, self.repairs, self.dropped + gone)


@dataclass(slots=True)
class _Mark:
    """A tag as it was written. `name`: the canonical one, or what the model invented."""

    start: int
    end: int
    name: str
    closes: bool
    repairs: tuple[str, ...]

    @property
    def is_known(self) -> bool:
        return self.name in TAGS


@dataclass(slots=True)
class _Pair:
    """A tag and its closer, with the pairs directly inside."""

    opener: _Mark
    closer: _Mark
    inside: list["_Pair"] = field(default_factory=list)


def parse(text: str) -> Annotated:
    """The phrases of a message as a model wrote it. Never raises; `parse(parse(x).render()) == parse(x)`."""
    marks = _without_code(text, list(_marks(text)))
    pairs, lonely = _matched(marks)
    reading = _Reading(text)
    unread = _nested(pairs)[::-1]
    while unread:  # no recursion: a model that repeats itself nests hundreds
        unread += reading.read(unread.pop())[::-1]
    reading.drop_rest(pairs, lonely)
    repairs = Counter(repair for mark in marks for repair in mark.repairs)
    repairs.update("opening tag as closer" for pair in pairs if not pair.closer.closes)
    repairs.update(reading.repairs)
    phrases = sorted(reading.phrases, key=lambda phrase: TAGS.index(phrase.tag))
    return Annotated(tuple(phrases), dict(repairs), tuple(reading.dropped))


def _marks(text: str) -> Iterator[_Mark]:
    for found in _MARK.finditer(text):
        written = re.sub(r"\s+", " ", found["name"])
        name = NAMES.get(written.casefold(), written)
        repairs = []
        if name in TAGS:
            if written.casefold() != name.casefold():
                repairs.append("plural")
            if written[: len(name)] != name or written[len(name) :] not in ("", "s"):
                repairs.append("upper or lower case")
            if re.search(r"\s", found[0]):
                repairs.append("blanks inside")
            if (found["before"], found["after"]) not in (("", ""), ("/", "")):
                repairs.append("slashes")
        yield _Mark(found.start(), found.end(), name, bool(found["before"] or found["after"]), tuple(repairs))


def _without_code(text: str, marks: list[_Mark]) -> list[_Mark]:
    """The marks that aren't part of code within a phrase.

    A phrase is looked at alone, from its opener to the next closer of its name: if every mark in between stands in
    code that begins and ends in between, they are all text.
    """
    if "`" not in text and "~~~" not in text:
        return marks
    kept = []
    number = 0
    while number < len(marks):
        opener = marks[number]
        kept.append(opener)
        number += 1
        if opener.closes or not opener.is_known:
            continue
        following = range(number, len(marks))
        end = next((at for at in following if marks[at].closes and marks[at].name == opener.name), number)
        if end > number and _all_in_code(text[opener.end : marks[end].start], marks[number:end], opener.end):
            number = end
    return kept


def _all_in_code(phrase: str, marks: list[_Mark], offset: int) -> bool:
    code = [found.span() for found in _CODE.finditer(phrase)]
    return all(any(start <= mark.start - offset and mark.end - offset <= end for start, end in code) for mark in marks)


def _matched(marks: list[_Mark]) -> tuple[list[_Pair], list[_Mark]]:
    """The marks that belong together, and those without a partner.

    A closer belongs to the last opener of its name that is still open. Openers in between that it passes over, and
    those left at the end, belong together where two of a name follow each other.
    """
    pairs: list[_Pair] = []
    lonely: list[_Mark] = []
    still_open: list[_Mark] = []

    def pair_up(openers: list[_Mark]) -> None:
        waiting: list[_Mark] = []
        for mark in openers:
            if waiting and waiting[-1].name == mark.name and mark.is_known:
                pairs.append(_Pair(waiting.pop(), mark))
            else:
                waiting.append(mark)
        lonely.extend(waiting)

    for mark in marks:
        if not mark.closes:
            still_open.append(mark)
            continue
        at = next((at for at in reversed(range(len(still_open))) if still_open[at].name == mark.name), None)
        if at is None:
            lonely.append(mark)
        else:
            pairs.append(_Pair(still_open[at], mark))
            pair_up(still_open[at + 1 :])
            del still_open[at:]
    pair_up(still_open)
    return pairs, lonely


def _nested(pairs: list[_Pair]) -> list[_Pair]:
    """The outermost pairs, each with those directly inside it."""
    outermost: list[_Pair] = []
    around: list[_Pair] = []
    for pair in sorted(pairs, key=lambda pair: pair.opener.start):
        while around and around[-1].closer.start < pair.opener.start:
            around.pop()
        (around[-1].inside if around else outermost).append(pair)
        around.append(pair)
    return outermost


class _Reading:
    """Collects what is kept and what is not, in the order of the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.phrases: list[Phrase] = []
        self.dropped: list[Dropped] = []
        self.repairs: Counter[str] = Counter()

    def read(self, pair: _Pair) -> list[_Pair]:
        """Keep a pair's phrase, or tell why not. Returns those inside it, unless the phrase holds their text."""
        name = pair.opener.name
        pieces = list(self._pieces(pair))
        whole = "".join(pieces).strip()
        full = [piece for piece in pieces if piece.strip()]
        if not pair.opener.is_known:
            self.dropped.append(Dropped(name, whole, "none of the eight tags"))
        elif not all(inner.opener.is_known for inner in pair.inside):
            self.dropped.append(Dropped(name, whole, "a tag inside without a partner, or none of the eight"))
        elif len(full) > 1 and self._keep(pair, self._flat(pair)):
            self.dropped += [
                Dropped(inner.opener.name, self._between(inner).strip(), "part of the phrase around it")
                for inner in pair.inside
            ]
            return []
        elif len(full) > 1:
            self.dropped.append(Dropped(name, whole, "in pieces around other tags"))
        elif not whole:
            if not pair.inside:
                self.dropped.append(Dropped(name, "", "empty"))
        elif len(whole) <= _LONGEST_NOTHING and whole.strip(":：") and _SAYS_NOTHING.fullmatch(whole):
            self.dropped.append(Dropped(name, whole, "says nothing"))
        elif not self._keep(pair, whole):
            lonely = any(_marks(whole))  # else nothing was left of it but a colon or marks
            why = "a tag inside without a partner, or none of the eight" if lonely else "empty"
            self.dropped.append(Dropped(name, whole, why))
        return pair.inside

    def _keep(self, pair: _Pair, text: str) -> bool:
        """Keep a phrase, if it is one, without what belongs to the tags around it."""
        repairs = []
        for before, behind in _AROUND:
            opens = self.text.endswith(before, 0, pair.opener.start) and text.startswith(behind)
            closes = self.text.startswith(behind, pair.closer.end) and text.endswith(before)
            if before == behind and opens != closes and text.count(before) % 2 == 0:
                continue  # it has a partner within the phrase
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

    def drop_rest(self, pairs: list[_Pair], lonely: list[_Mark]) -> None:
        """Tell of the text outside all pairs, and of the tags without a partner."""
        covered = sorted((pair.opener.start, pair.closer.end) for pair in pairs)
        stops = sorted(lonely, key=lambda mark: mark.start)
        at, tag, reason = 0, "", "outside any tag"
        for start, end in [*covered, (len(self.text), len(self.text))]:
            while stops and stops[0].start < max(start, at):
                mark = stops.pop(0)
                if mark.start < at:  # inside a pair, which was dropped for it
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
            self.dropped.append(Dropped(tag, text.strip(), reason))

    def _pieces(self, pair: _Pair) -> Iterator[str]:
        """A pair's own text, without what stands in the pairs inside it."""
        at = pair.opener.end
        for inner in pair.inside:
            yield self.text[at : inner.opener.start]
            at = inner.closer.end
        yield self.text[at : pair.closer.start]

    def _between(self, pair: _Pair) -> str:
        return self.text[pair.opener.end : pair.closer.start]

    def _flat(self, pair: _Pair) -> str:
        """A pair's whole text without the marks inside; nothing if one of those inside is no proper one."""
        marks: list[_Mark] = []
        unseen = list(pair.inside)
        while unseen:
            inner = unseen.pop()
            if not inner.opener.is_known:
                return ""
            marks += [inner.opener, inner.closer]
            unseen += inner.inside
        starts = [pair.opener.end, *sorted(mark.end for mark in marks)]
        ends = [*sorted(mark.start for mark in marks), pair.closer.start]
        return "".join(self.text[start:end] for start, end in zip(starts, ends, strict=True)).strip()


def _is_phrase(tag: str, text: str) -> bool:
    """Whether there is any text, no mark in it but in code, and none that would close it."""
    marks = list(_marks(text))
    return bool(text) and _all_in_code(text, marks, 0) and not any(mark.closes and mark.name == tag for mark in marks)
