"""Channels of gpt-oss (harmony) as text: analysis and commentary are reasoning, final is the answer.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

Format: github.com/openai/harmony. Its library reads token ids, which a server doesn't send.
"""

import re

from train.llm.reasoning.mentions import is_named, is_word

_HEADER = re.compile(
    r"(?:<\|start\|>(?P<role>[^<]*))?(?:<\|channel\|>(?P<channel>[^<]*))?(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
_END = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
_TOKENS = re.compile(r"<\|(?:channel|message|constrain|start|call)\|>")
_SIGNS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|call|>")
_RUN = re.compile(
    r"(?:<\|(?:start|channel|message|constrain|call)\|>(?P<name>assistant|analysis|commentary|final|user|system)?)+"
)


def holds_harmony(text: str) -> bool:
    """Return True if a text holds tokens of this format, and not as words of a sentence."""
    return any(sign in text for sign in _SIGNS) and not all(_is_mentioned(text, run) for run in _RUN.finditer(text))


def _is_mentioned(text: str, run: re.Match[str]) -> bool:
    after = text[run.end() :]
    if run["name"] and not after[:1].isspace() and after[:1] not in tuple(".,;)"):
        return False
    return is_named(text, run.start(), run.end()) or (not run["name"] and is_word(text, run.start(), run.end()))


def split_channels(text: str, plain: str) -> tuple[str, str, str] | None:
    """Return reasoning, answer and the rest; None if no message is complete enough.

    `plain`: `text` without code. Text before the first header is reasoning: its own header was in the prompt. If the
    first header opens a user's turn, it is the answer: the final channel was in the prompt.
    """
    reasoning: list[str] = []
    header = _HEADER.search(plain)
    if header is None:
        return None
    before = text[: header.start()]
    if not _is_of_model(header) and before.strip():
        return "", before, text[header.start() :]
    reasoning.append(_TOKENS.sub("", before.replace("<|end|>", "")))
    while header is not None and _is_of_model(header):
        end = _END.search(plain, header.end())
        body = text[header.end() : end.start() if end else len(text)]
        channel = (header["channel"] or "").split()
        if channel[:1] == ["final"] or not (channel or reasoning[0].strip() or len(reasoning) > 1):
            return _join(reasoning), body, text[end.start() :] if end else ""
        reasoning.append(body)
        header = _HEADER.search(plain, end.start()) if end else None
    return None


def _is_of_model(header: re.Match[str]) -> bool:
    role = (header["role"] or "assistant").split()
    return role[:1] not in (["user"], ["system"], ["developer"])


def _join(parts: list[str]) -> str:
    return "\n".join(part.strip() for part in parts if part.strip())
