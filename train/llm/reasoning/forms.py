r"""Forms in which models mark reasoning in their text, one per entry.

Sources: the reasoning parsers of vLLM, SGLang and llama.cpp, and the models' chat templates. No library fits:
openai-harmony reads token ids with a vocabulary that it downloads, and the parsers of vLLM and SGLang require the
complete engine. gpt-oss with its special tokens is in `harmony.py`.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_WORDS = (
    r"(?:[a-z]+[:_])?think(?:ing)?|thoughts?|reasoning|reflection|scratch_?pad|inner_(?:monologue|thoughts?)"
    r"|chain_of_thought"
)
_OWN_WORDS = "(?:[a-z]+[:_])?think"
"""Tag names that only models use. The other names may occur in a document."""
_UPPER = "(?:THINK(?:ING)?|THOUGHTS?|REASONING)"
_IN_TOKEN = "(?:think(?:ing)?|thoughts?|reasoning)"
_FIRST_WORDS = (
    "We|We'll|We're|The|User|I|I'll|I'm|Need|Okay|Ok|Let|Let's|It|It's|This|That|They|So|You|Just|Simple|Must|Should"
    "|Hm+|Wait|First|Now|Maybe|Probably|Question|Answer|Provide|Given|Look|Looks|Looking|Alright|Sure|What|How|Can"
    "|Could|Possibly|There|Here|To|For|In|If|As|Thus|Also|Actually|Well|Yes|No|Given|Check|Think|Task|Asked|Want|Wants"
)
_FIRST_LINES = "The user|User|We need|Okay|Let's|Need to"
"""Elsewhere a line of one such word is a heading."""
_HERE_IS = r"[*#_ ]*Here(?:'s|’s| is) my"


def _tag(left: str, right: str) -> str:
    return rf"(?i:{left}(?P<word>{_WORDS})(?:\s[^<>]*?)?{right})"


@dataclass(frozen=True, slots=True)
class Form:
    """Regular expressions of the opener of reasoning, at the beginning of a text, and of its closer.

    alone: the closer ends reasoning also without an opener, which the chat template put into the prompt. `token`:
        anywhere but in code; `glued`: between two words without a space; `word`: answers may speak of it, so
        block_ends.py examines the text around it.
    needs_closer: an ordinary answer may begin with the opener, so there is no reasoning without the closer. In other
        forms a text without the closer is reasoning that was cut.
    holds_turn: the closer itself ends a turn and begins another.
    """

    models: str
    opener: str
    closer: str
    alone: Literal["token", "glued", "word"] | None = None
    needs_closer: bool = False
    holds_turn: bool = False

    def openers(self, text: str, closer: re.Match[str], start: int) -> Iterator[re.Match[str]]:
        """Return the openers between `start` and a closer of this form; a tag has the closer's name."""
        if "{word}" not in self.closer:
            return _compiled(self.opener, "").finditer(text, start, closer.start())
        name = re.sub(r"[\s</>]", "", closer[0]).casefold()
        tags = TAG.finditer(text, start, closer.start())
        return (tag for tag in tags if not tag["closes"] and tag["name"].casefold() == name)

    def closers(self, text: str, opener: re.Match[str]) -> list[re.Match[str]]:
        """Return the closers after an opener that aren't in backticks; those of a tag have the opener's name."""
        word = opener["word"] or opener["escaped"] or ""
        matches = _compiled(self.closer, word).finditer(text, opener.end())
        return [match for match in matches if not text[match.start() - 1] == "`" == text[match.end() : match.end() + 1]]


@functools.lru_cache(maxsize=64)
def _compiled(mark: str, word: str) -> re.Pattern[str]:
    return re.compile(mark.replace("{word}", re.escape(word)), re.IGNORECASE)


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
    Form("Gemma 4 without its special tokens, so that the end can't be told", r"thought\n(?![a-z])", "(?!)"),
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
        rf"(?:assistant)?(?:analysis|commentary)(?=(?:{_FIRST_WORDS}|\n(?:{_FIRST_LINES}))\b(?!\s*[=(]|\.\w))",
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
CLOSER = re.compile(
    "|".join(f"(?:{pattern.pattern})" for form, pattern in _ALONE if form.alone != "glued"), re.IGNORECASE
)
"""Any closer that is valid without an opener."""
TAG = re.compile(rf"<(?P<closes>/\s*)?(?P<name>{_WORDS})(?:\s[^<>]*?)?>", re.IGNORECASE)
"""A tag that answers may speak of, as of [THINK]."""
BLOCK = re.compile(rf"^[^\S\n]*(?:<(?P<name>{_OWN_WORDS})>|\[(?P<mark>{_UPPER})\])", re.MULTILINE | re.IGNORECASE)
"""An opener at the beginning of a line, without names that may occur in a document."""
_OWN_WORD = re.compile(_OWN_WORDS, re.IGNORECASE)
_TOKEN = re.compile(
    "|".join(f"{form.opener}|{form.closer}" for form in FORMS if form.alone == "token" and not form.needs_closer)
)
_MARK = re.compile(
    rf"<(?=[|｜/a-zA-Z])(?:[|｜]|/?s>|(?:/\s*)?(?:{_WORDS})[\s>]|/?(?:\w+:)?(?:tool_?calls?|function)|(?:start|end)_of_|turn\||channel\||(?:unused|SPECIAL_|extra_id_|reserved_|ctrl)\d"
    r"|(?:seed:)?eo[a-z]>|(?:bos|pad|unk)>)",
    re.IGNORECASE,
)
_BRACKET = re.compile(rf"\[(?:/{_UPPER}\]|unused\d|BEGIN FINAL|END FINAL|/?INST\]|EO[ST]\]|\||THINK|TOOL_CALL|e~\[)")


def may_hold_marks(text: str) -> bool:
    """Return True if a text without an opener may hold a closer or a control token. Most answers hold none."""
    return bool(
        ("<" in text and _MARK.search(text))
        or ("[" in text and _BRACKET.search(text))
        or "◁" in text
        or ("assistant" in text and ("assistantfinal" in text or "assistant\n\n" in text))
        or "functools[" in text
        or "]~b]" in text
    )


def tokens_in(text: str) -> Iterator[re.Match[str]]:
    """Return the marks in a text that are tokens of a model: an answer holds them only to speak of them."""
    signs = ("<|", "|>", "◁", "[unused", "<unused")
    return _TOKEN.finditer(text) if any(sign in text for sign in signs) else iter(())


def lone_closers(text: str) -> list[tuple[Form, re.Match[str]]]:
    """Return all closers that are valid without an opener, in their order. One regular expression for all is slow."""
    closers = ((form, closer) for form, pattern in _ALONE for closer in pattern.finditer(text))
    return sorted(closers, key=lambda item: item[1].start())


def document_name(opener: re.Match[str], form: Form) -> str:
    """Return the name of an opener that may be a tag of an ordinary document; empty for a model's own mark."""
    if form.models == "Dify":
        return "details"
    word: str = opener["word"] or ""
    return "" if _OWN_WORD.fullmatch(word) else word


def form_of(opener: re.Match[str]) -> Form:
    """Return the form of a match of `OPENER`."""
    return next(FORMS[int(name[4:])] for name, value in opener.groupdict().items() if value and name.startswith("form"))
