"""What a system message is looked at for before its row is kept: its language, and what it gives away.

Nothing here asks a model. Each of the two errs on the side of keeping the row: what can't be told stops nothing.
"""

import functools
import re
from collections import Counter
from typing import TYPE_CHECKING

from train.data.sources.unread_text import WIDE
from train.datagen.words import runs_of, words_of

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# Language

_COUNTS_AS = {
    code: told
    for told, codes in {
        "da/no": "da no nn",
        "bs/hr/sr": "bs hr sr",
        "id/ms": "id ms",
        "gl/pt": "gl pt",
        "ar": "arz ary",
        "de": "lb",
        "el": "grc",
        "en": "pcm",
        "es": "an ext",
        "fr": "gcf gcr wa",
        "he": "hbo",
        "it": "lij vec",
        "lv": "ltg",
        "nl": "fy",
        "uz": "uzs",
        "zh": "wuu yue",
    }.items()
    for code in codes.split()
}
"""Close relatives, which no one tells apart in a sentence or two. What the library thinks of each is added up."""

_NOT_PROSE = re.compile(
    r"""(?:^|\n)[^\S\n]*(?P<fence>`{3,}|~{3,}).*?(?:\n[^\S\n]*(?P=fence)|\Z)   # code
    |(?P<ticks>`+)[^\n]*?(?P=ticks)
    |\$\$.*?\$\$ |\$[^$\n]*\$ |\\\(.*?\\\) |\\\[.*?\\\] |\\[a-zA-Z]+          # mathematics
    |https?://\S+ |\S+@\S+ |</?[a-zA-Z][^<>]*>
    |"[^"\n]*" |“[^”\n]*” |„[^“”\n]*[“”] |«[^»\n]*» |»[^«\n]*« |「[^」\n]*」 |『[^』\n]*』   # quotations
    |(?<!\w)'[^'\n]*'(?!\w) |(?<!\w)‘[^’\n]*’(?!\w)
    |\S*[\d_/\\=<>{}()\[\]|@\#~^]\S*                                          # names, paths, formulas
    """,
    re.VERBOSE | re.DOTALL,
)
_BREAK = re.compile(r"\n+|(?<=[.!?:;।؟])\s+|(?<=[。！？：；])")
_LETTERS = re.compile(rf"(?P<wide>[{WIDE}\uac00-\ud7af]+)|(?P<latin>[A-Za-z\u00aa-\u024f\u1e00-\u1eff]+)|[^\W\d_]+")

_LETTERS_OF_A_WIDE_ONE = 5
"""A Chinese character or a Korean syllable says as much as some letters do."""
_FEWEST_LETTERS = 15
_FEWEST_LETTERS_OF_A_PIECE = 10
_SURE = 0.85
"""Least confidence. With this and the rules below, 70 % of 33,000 fortune cookies and paragraphs of man pages in 25
languages were told. Those told otherwise than they were filed, as far as we read them, were filed wrong."""
_EXCLUDED = 0.2
"""A piece whose best language is five times likelier than the whole text's is in another one."""
_READ, _FIRST, _LAST = 2_400, 500, 250
"""Characters of a long text that are cleaned, and that are then rated, in half a millisecond."""


def language_of(text: str) -> str | None:
    """The language of a text by its ISO 639 code (of two letters where there is one); None where it can't be told.

    Code, formulas, quotations and addresses aren't looked at. None: fewer than 15 letters are left, py3langid isn't
    sure, or the text is in more than one language, as in a question for a translation. Close relatives are told by
    the codes of all: `da/no`, `bs/hr/sr`, `id/ms`, `gl/pt`. Of a long text the beginning and the end are read.
    """
    prose = _prose(text)
    scripts = _letters_by_script(prose)
    letters = scripts.total()
    if letters < _FEWEST_LETTERS or max(scripts.values()) < 0.75 * letters:
        return None
    rated = _rated(prose)
    language = max(rated, key=rated.__getitem__)
    if rated[language] < _SURE or language == "zxx":  # zxx: no language, mostly code
        return None
    if language == "zh" and _could_be_japanese(prose):
        return None
    for piece in _BREAK.split(prose):
        if _letters_by_script(piece).total() < _FEWEST_LETTERS_OF_A_PIECE or piece == prose:
            continue
        best, _ = _identifier().classify(piece)
        if _COUNTS_AS.get(best, best) != language:
            rated = _rated(piece)
            if rated[language] < _EXCLUDED * max(rated.values()):
                return None
    return language


def _prose(text: str) -> str:
    half = _READ // 2
    parts = [text] if len(text) <= _READ else [text[:half], text[-half:]]
    prose = "\n".join(_NOT_PROSE.sub(" ", part) for part in parts)
    return prose if len(prose) <= _FIRST + _LAST else f"{prose[:_FIRST]}\n{prose[-_LAST:]}"


def _letters_by_script(text: str) -> Counter[str]:
    counted: Counter[str] = Counter()
    for run in _LETTERS.finditer(text):
        script = run.lastgroup or "other"
        counted[script] += len(run[0]) * (_LETTERS_OF_A_WIDE_ONE if script == "wide" else 1)
    return counted


def _could_be_japanese(text: str) -> bool:
    """Whether all its Chinese characters are in the Japanese set, JIS X 0208: then a few of them may be either."""
    try:
        "".join(re.findall(r"[\u3400-\u9fff]", text)).encode("shift_jis")
    except UnicodeEncodeError:
        return False
    return True


def _rated(text: str) -> dict[str, float]:
    """How likely each language is. The numbers are few and add up to one."""
    rated: dict[str, float] = {}
    for code, share in _identifier().rank(text):
        language = _COUNTS_AS.get(code, code)
        rated[language] = rated.get(language, 0.0) + share
    return rated


@functools.cache
def _identifier() -> "LanguageIdentifier":
    """py3langid's model, a second to unpack. Against lingua 2.1 on our samples: as good or better, 20 times faster,
    and a tenth of the memory."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def load_languages() -> None:
    """Load what `language_of` needs: a second, better spent before requests are under way."""
    _identifier()


# Giving the answer away

_RUN = 5
_SHORT_ANSWER = 8
_CHOICE = {"or", "oder", "ou", "o", "of", "lub", "или", "або", "veya", "eller", "atau", "hoặc", "tai", "vagy", "sau"}
_COMMON = {"true", "false", "none", "yes", "okay", "right", "wrong", "correct", "incorrect", "maybe", "nein", "vrai"}
_COMMON |= {"faux", "richtig", "falsch", "verdadero", "falso", "vero", "tidak", "neither", "both", "unknown"}


def leaked_share(system: str, questions: str, answer: str) -> float:
    """How much of an answer its system message gives away, from 0 to 1.

    The share of the answer's words that lie in runs of five words which also stand in the message and not in the
    questions. An answer of fewer than eight words counts as a whole: 1.0 if it stands in the message and not in the
    questions, else 0. One or two words that the message offers as a choice ("Positive, Negative or Neutral") or that
    stand in any text (yes, true, a letter, a number of one or two digits) are no secret, and 0.

    Words are compared without upper case, marks and punctuation; in Chinese, Japanese, Thai and the like, each
    character is one.
    """
    of_answer, of_system, of_questions = words_of(answer), words_of(system), words_of(questions)
    if len(of_answer) < _SHORT_ANSWER:
        gives_away = _tells(of_answer) and _stands_in(of_answer, of_system) and not _stands_in(of_answer, of_questions)
        return float(gives_away and not (len(of_answer) <= 2 and _is_choice(of_answer, system)))
    told = runs_of(of_system, _RUN) - runs_of(of_questions, _RUN)
    covered = [False] * len(of_answer)
    for start in range(len(of_answer) - _RUN + 1):
        if tuple(of_answer[start : start + _RUN]) in told:
            covered[start : start + _RUN] = [True] * _RUN
    return sum(covered) / len(of_answer)


def _tells(words: list[str]) -> bool:
    """Whether so few words can be recognised at all as an answer."""
    if any(re.fullmatch(f"[{WIDE}]", word) for word in words):
        return len(words) >= 3
    if len(words) == 1:
        return len(words[0]) >= (3 if words[0].isdecimal() else 4) and words[0] not in _COMMON
    return sum(map(len, words)) >= 4


def _is_choice(words: list[str], system: str) -> bool:
    """Whether every sentence that names them is one of a choice: with an `or`, a slash, or three things in a row."""
    sentences = [sentence for sentence in _BREAK.split(system) if _stands_in(words, words_of(sentence))]
    return all(
        not _CHOICE.isdisjoint(words_of(sentence))
        or re.search("[/|]", sentence)
        or len(re.findall("[,،、，]", sentence)) > 1
        for sentence in sentences
    )


def _stands_in(words: list[str], text: list[str]) -> bool:
    return any(text[start : start + len(words)] == words for start in range(len(text) - len(words) + 1))
