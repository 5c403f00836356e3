r"""The forms in which models mark their reasoning, one a row, where the server leaves it in the text.

Sources: the reasoning parsers of vLLM and SGLang, llama.cpp's, and the models' chat templates. No library for this is
light to depend on: openai-harmony reads token ids with a vocabulary that it downloads, and vLLM's and SGLang's need the
whole engine. gpt-oss with its special tokens is in `harmony.py`.
"""

import functools
import re
from dataclasses import dataclass
from typing import Literal

_WORDS = (
    r"(?:[a-z]+[:_])?think(?:ing)?|thoughts?|reasoning|reflection|scratch_?pad|inner_(?:monologue|thoughts?)"
    r"|chain_of_thought"
)
_UPPER = "(?:THINK(?:ING)?|THOUGHTS?|REASONING)"
_IN_TOKEN = "(?:think(?:ing)?|thoughts?|reasoning)"
_FIRST_WORDS = "We|We'll|We're|The|User|I|I'll|Need|Okay|Ok|Let|Let's|It|This|They|So|You|Just|Simple|Must|Should"
_HERE_IS = r"[*#_ ]*Here(?:'s|’s| is) my"


def _tag(left: str, right: str) -> str:
    return rf"(?i:{left}(?P<word>{_WORDS})(?:\s[^<>]*?)?{right})"


@dataclass(frozen=True, slots=True)
class Form:
    """Regular expressions of what opens reasoning at the beginning of a text, and of what closes it.

    - `alone`: the closer ends reasoning also without an opener, which the chat template has put into the prompt.
      `token`: anywhere but in code; `glued`: between two words without a space; `word`: answers may speak of it, so
      `reasoning.py` looks at what stands around it.
    - `needs_closer`: an ordinary answer may begin with the opener, so that nothing is reasoning without the closer.
      Elsewhere a text without the closer is reasoning that was cut.
    - `holds_turn`: the closer itself ends a turn and begins another.
    """

    models: str
    opener: str
    closer: str
    alone: Literal["token", "glued", "word"] | None = None
    needs_closer: bool = False
    holds_turn: bool = False

    def find_opener(self, text: str) -> int | None:
        """Return where a text first opens reasoning in this form, at its beginning or further on."""
        if "{word}" in self.closer:
            return next((tag.start() for tag in TAG.finditer(text) if not tag["closes"]), None)
        found = re.search(self.opener, text)
        return found.start() if found else None

    def find_closer(self, text: str, opener: re.Match[str]) -> re.Match[str] | None:
        """Return the first closer after an opener that isn't in backticks; one of a tag has the opener's name."""
        word = opener["word"] or opener["escaped"] or ""
        closers = _compiled(self.closer, word).finditer(text, opener.end())
        return next(
            (one for one in closers if not text[one.start() - 1] == "`" == text[one.end() : one.end() + 1]), None
        )


@functools.lru_cache(maxsize=64)
def _compiled(closer: str, word: str) -> re.Pattern[str]:
    return re.compile(closer.replace("{word}", re.escape(word)), re.IGNORECASE)


FORMS = (
    # Also Phi, Nemotron, EXAONE, Granite 3.3, Hunyuan, ERNIE, Step, Seed (seed:think), MiniMax (mm:think), LongCat.
    Form("DeepSeek, Qwen, GLM and most others", _tag("<", ">"), r"</\s*{word}\s*>", alone="word"),
    Form("tags that were escaped for HTML", _tag("&lt;", "&gt;").replace("<word>", "<escaped>"), r"&lt;/{word}\s*&gt;"),
    Form("an empty tag", rf"(?i:<(?:{_WORDS})\s*/>)", ""),
    Form("Magistral, Ministral", rf"\[{_UPPER}\]", rf"\[/{_UPPER}\]", alone="word"),
    Form("Kimi-VL", "◁think▷", "◁/think▷", alone="token"),
    Form(
        "Solar Open",
        r"<\|think\|>(?=(?s:.*?)<\|content\|>)",
        r"<\|end\|>\s*<\|begin\|>assistant\s*<\|content\|>",
        alone="token",
        holds_turn=True,
    ),
    Form(
        "Command A, OpenThinker, Sky-T1, MiniCPM, Solar Open 2",
        rf"(?i:<\|(?:(?:start|begin)_?(?:of_?)?)?{_IN_TOKEN}(?:[_:]?(?:start|begin))?\|>)",
        rf"<\|(?:/|end_?(?:of_?)?){_IN_TOKEN}\|>|<\|{_IN_TOKEN}[_:]?end\|>|</\|{_IN_TOKEN}\|>",
        alone="token",
    ),
    Form("Apertus", r"<\|inner_prefix\|>", r"<\|inner_suffix\|>", alone="token"),
    Form(
        "s1", r"<\|im_start\|>think\n", r"(?:<\|im_end\|>\s*)?<\|im_start\|>answer\n?", alone="token", holds_turn=True
    ),
    Form("Kimi K3", r"<\|open\|>think<\|sep\|>", r"<\|close\|>think<\|sep\|>", alone="token"),
    Form("Inkling", r"(?:<\|message_model\|>)?<\|content_thinking\|>", r"<\|end_message\|>"),
    Form("Gemma 4", r"<\|channel>(?:thought\s)?", r"<channel\|>", alone="token"),
    Form("Gemma 4 without its special tokens, so that the end can't be told", r"thought\n", "(?!)"),
    Form("MedGemma 1.5", r"<unused94>(?:thought\s)?", "<unused95>", alone="token"),
    Form("openPangu", r"\[unused16\]", r"\[unused17\]", alone="token"),
    Form(
        "HyperCLOVA X SEED Think",
        r"/think\n",
        r"<\|im_end\|>\s*<\|im_start\|>assistant\n?",
        needs_closer=True,
        holds_turn=True,
    ),
    Form(
        "gpt-oss without its special tokens",
        rf"(?:assistant)?(?:analysis|commentary)(?=\n?(?:{_FIRST_WORDS})\b)",
        "assistantfinal",
        alone="glued",
    ),
    Form(
        "gpt-oss without its special tokens, with reasoning of other first words",
        r"(?:assistant)?(?:analysis|commentary)",
        r"(?:(?<=\S)|(?<=\n))assistantfinal",
        needs_closer=True,
    ),
    Form("Granite 3.2", rf"{_HERE_IS} thought process:[*_]*", rf"\n{_HERE_IS} response:[*_]*", needs_closer=True),
    Form("Apriel", "Here are my reasoning steps:", r"\[BEGIN FINAL RESPONSE\]", alone="token", needs_closer=True),
    Form("HuatuoGPT-o1", r"#+ Thinking\n", r"\n#+ Final Response\n", needs_closer=True),
    Form("a code block with a label", r"```(?:think(?:ing)?|thoughts?|reasoning)\n", r"\n```[^\S\n]*(?=\n|\Z)"),
    Form("Open WebUI", r'<details[^<>]*\btype="reasoning"[^<>]*>', "</details>"),
    Form("Dify", r"<details[^<>]*>\s*<summary>\s*(?:Thinking|Thought|Reasoning)[^<]*</summary>", "</details>"),
    Form("Poe", r"[*_]Thinking\.\.\.[*_]\s*(?=>)", r"(?<!\n)\n+(?![>\n])", needs_closer=True),
    Form("Ollama's command line", r"Thinking\.\.\.\n", r"\.\.\.done thinking\.\n", needs_closer=True),
)

_BLANK = "[\\s\ufeff\u200b-\u200f\u2060]*+"
OPENER = re.compile(
    rf"{_BLANK}(?P<fence>```[^\S\n]*\n{_BLANK})?"
    f"(?:{'|'.join(f'(?P<form{number}>{form.opener})' for number, form in enumerate(FORMS))})"
)
"""An opener at the beginning of a text, after blanks, a byte order mark or the first line of a code block."""
_ALONE = tuple(
    (form, re.compile(form.closer.replace("{word}", f"(?:{_WORDS})"), 0 if form.alone == "glued" else re.IGNORECASE))
    for form in FORMS
    if form.alone
)
TAG = re.compile(rf"<(?P<closes>/\s*)?(?:{_WORDS})(?:\s[^<>]*?)?>", re.IGNORECASE)
"""A mark that answers may speak of, as they may of [THINK]."""
_TOKEN = re.compile(
    "|".join(f"{form.opener}|{form.closer}" for form in FORMS if form.alone == "token" and not form.needs_closer)
)
_MARK = re.compile(
    rf"<(?:[|｜]|/?s>|/\s*(?:{_WORDS})\s*>|(?:start|end)_of_|turn\||channel\||(?:unused|SPECIAL_|extra_id_|reserved_|ctrl)\d"
    r"|(?:seed:)?eo[a-z]>|(?:bos|pad|unk)>)",
    re.IGNORECASE,
)
_BRACKET = re.compile(rf"\[(?:/{_UPPER}\]|unused\d|BEGIN FINAL|END FINAL|/?INST\]|EO[ST]\]|\|)")


def may_hold_marks(text: str) -> bool:
    """Return whether a text that begins with no opener may hold a closer or a control token. Most answers hold none."""
    return bool(
        ("<" in text and _MARK.search(text))
        or ("[" in text and _BRACKET.search(text))
        or "◁" in text
        or ("assistant" in text and ("assistantfinal" in text or "assistant\n\n" in text))
    )


def holds_token(text: str) -> bool:
    """Return whether a mark is in the text that is a token of a model, which no answer holds outside code."""
    signs = ("<|", "|>", "◁", "[unused", "<unused")
    return any(sign in text for sign in signs) and bool(_TOKEN.search(text))


def closers_alone(text: str) -> list[tuple[Form, re.Match[str]]]:
    """Return all closers that may stand without an opener, in their order. One regular expression for all is slow."""
    found = ((form, closer) for form, pattern in _ALONE for closer in pattern.finditer(text))
    return sorted(found, key=lambda one: one[1].start())


def form_of(opener: re.Match[str]) -> Form:
    """Return the form of an opener that was found."""
    return next(FORMS[int(name[4:])] for name, value in opener.groupdict().items() if value and name.startswith("form"))
