"""Language detection of texts, without a model: unknown when in doubt."""

import functools
import re
from collections import Counter
from typing import TYPE_CHECKING

from train.data.sources.unread_text import WIDE

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

_COUNTS_AS = {
    code: language
    for language, codes in {
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
"""Close relatives that can't be told apart in a sentence or two; their probabilities are added."""

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
SENTENCE_BREAK = re.compile(r"\n+|(?<=[.!?:;।؟])\s+|(?<=[。！？：；])")
_LETTERS = re.compile(rf"(?P<wide>[{WIDE}\uac00-\ud7af]+)|(?P<latin>[A-Za-z\u00aa-\u024f\u1e00-\u1eff]+)|[^\W\d_]+")

_LETTERS_PER_WIDE_CHARACTER = 5
"""A Chinese character or a Korean syllable counts as this many letters."""
_MIN_LETTERS = 15
_MIN_LETTERS_OF_A_PIECE = 10
_MIN_CONFIDENCE = 0.85
"""With this and the rules below, 70 % of 33,000 fortune cookies and paragraphs of man pages in 25 languages got a
language. Those that differed from their label, as far as we read them, were labelled wrong."""
_MAX_RATIO = 0.2
"""A piece is in another language if the text's language is at most this likely, relative to the piece's best."""
_READ, _FIRST, _LAST = 2_400, 500, 250
"""Characters of a long text that are cleaned, and of these the first and last that are classified, in 0.5 ms."""


def detect_language(text: str) -> str | None:
    """Return the language of a text by its ISO 639 code (of two letters if there is one); None if it is uncertain.

    - Code, formulas, quotations and addresses are ignored, and so is the middle of a long text.
    - None: fewer than 15 letters are left, py3langid is uncertain, or the text is in several languages, like a request
      for a translation.
    - Close relatives share a code: `da/no`, `bs/hr/sr`, `id/ms`, `gl/pt`.
    """
    prose = _extract_prose(text)
    scripts = _count_letters(prose)
    letters = scripts.total()
    if letters < _MIN_LETTERS or max(scripts.values()) < 0.75 * letters:
        return None
    probabilities = _classify(prose)
    language = max(probabilities, key=probabilities.__getitem__)
    if probabilities[language] < _MIN_CONFIDENCE or language == "zxx":  # zxx: no linguistic content, mostly code
        return None
    if language == "zh" and _could_be_japanese(prose):
        return None
    for piece in SENTENCE_BREAK.split(prose):
        if _count_letters(piece).total() < _MIN_LETTERS_OF_A_PIECE or piece == prose:
            continue
        best, _ = _identifier().classify(piece)
        if _COUNTS_AS.get(best, best) != language:
            probabilities = _classify(piece)
            if probabilities[language] < _MAX_RATIO * max(probabilities.values()):
                return None
    return language


def _extract_prose(text: str) -> str:
    half = _READ // 2
    parts = [text] if len(text) <= _READ else [text[:half], text[-half:]]
    prose = "\n".join(_NOT_PROSE.sub(" ", part) for part in parts)
    return prose if len(prose) <= _FIRST + _LAST else f"{prose[:_FIRST]}\n{prose[-_LAST:]}"


def _count_letters(text: str) -> Counter[str]:
    """Count letters by script: wide, Latin or other."""
    counts: Counter[str] = Counter()
    for run in _LETTERS.finditer(text):
        script = run.lastgroup or "other"
        counts[script] += len(run[0]) * (_LETTERS_PER_WIDE_CHARACTER if script == "wide" else 1)
    return counts


def _could_be_japanese(text: str) -> bool:
    """Return whether all Chinese characters of a text are in the Japanese set, JIS X 0208."""
    try:
        "".join(re.findall(r"[\u3400-\u9fff]", text)).encode("shift_jis")
    except UnicodeEncodeError:
        return False
    return True


def _classify(text: str) -> dict[str, float]:
    """Return the probability of each language."""
    probabilities: dict[str, float] = {}
    for code, probability in _identifier().rank(text):
        language = _COUNTS_AS.get(code, code)
        probabilities[language] = probabilities.get(language, 0.0) + probability
    return probabilities


@functools.cache
def _identifier() -> "LanguageIdentifier":
    """Return py3langid's model, which takes a second to load.

    Compared with lingua 2.1 on our samples: as accurate or better, 20 times as fast, a tenth of the memory.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def load_language_detector() -> None:
    """Load the model of `detect_language`, before requests are in flight: it takes a second."""
    _identifier()
