"""The reasoning that some models write before what they say (Qwen3, DeepSeek-R1, Magistral), told from it.

A server with a parser for it (vLLM's --reasoning-parser) sends it beside the content, and nothing is to be done. One
without leaves it in: `<think>...</think>` at the beginning, or without its opening tag where the chat template has put
that into the prompt. None of it belongs to the message, the verdict or the new answer.
"""

import re
from dataclasses import dataclass

_NAMES = "think|thinking|thought|reasoning|seed:think"
_OPENER = re.compile(rf"\s*(?:<(?P<name>{_NAMES})>|\[(?P<bracketed>THINK)\])")
_CLOSER_ALONE = re.compile(rf"^(?P<reasoning>.*?)(?:</(?:{_NAMES})>|\[/THINK\])[^\S\n]*(?:\n|$)", re.DOTALL)
_ANY = re.compile(rf"</?(?:{_NAMES})>|\[/?THINK\]")


@dataclass(frozen=True, slots=True)
class Said:
    """What a model wrote, in two parts. `unfinished`: the reasoning never ended, and nothing was said."""

    text: str
    reasoning: str | None = None
    unfinished: bool = False

    @property
    def holds_reasoning(self) -> bool:
        """Whether tags of reasoning are left in the text: an answer may speak of them, so they stay."""
        return bool(_ANY.search(self.text))


def without_reasoning(text: str) -> Said:
    """`text` without the reasoning that it begins with. Never raises."""
    if opener := _OPENER.match(text):
        closer = f"</{opener['name']}>" if opener["name"] else "[/THINK]"
        reasoning, found, said = text[opener.end() :].partition(closer)
        return Said(said.lstrip(), reasoning.strip(), unfinished=not found)
    closed = _CLOSER_ALONE.match(text)
    # An answer that shows such tags has them in code, or the opening one before the closing one.
    if closed and closed["reasoning"].count("```") % 2 == 0 and not _ANY.search(closed["reasoning"]):
        return Said(text[closed.end() :].lstrip(), closed["reasoning"].strip())
    return Said(text)
