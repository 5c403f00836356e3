"""Tool calls in the text of an answer, in the forms of vLLM's and SGLang's parsers.

A server without the parser of its model sends the call as the answer. A text is a call if it begins with one, or
consists of one after a short lead-in. A call in code, or in the middle of an explanation, is an example.
"""

import re

from train.llm.reasoning.mentions import SENTENCE_END, speaks_of_marks

_CALL = re.compile(
    r"<tool_call>\s*(?:[{\[<]|[\w.-]+\s*(?:<arg_key>|</tool_call>))|<tool_calls>\s*[{\[<]"  # Hermes, Qwen, GLM, xLAM
    r"|\[TOOL_CALLS?\]\s*(?:[\[{]|[\w.-]+\s*(?:\[(?:ARGS|CALL_ID)\]|\{))"  # Mistral
    r"|<\|python_tag\|>(?=\S)|<function=[\w.-]+>|functools\s*\[\s*\{"  # Llama 3, Qwen3-Coder, Phi-4-mini
    r"|<(?:\w+:|｜DSML｜)?function_calls>\s*<|<invoke name=|<\w+:tool_calls?>"  # Claude, Grok, DeepSeek-V3.2, MiniMax
    r"|<[|｜]tool[▁_ ]calls?(?:_section)?[▁_ ](?:begin|start)[|｜]>|<\|tool_call\|>\s*[\[{]"  # DeepSeek, Kimi, LFM2
    r"|<TOOLCALL>\s*[\[{]|<longcat_tool_call>|<start_function_call>|<\|START_ACTION\|>|<\|tool_call>call:"
    r"|<\|action_start\|>\s*<\|(?:plugin|interpreter)\|>|<\|tool_calls_prefix\|>"  # InternLM, Apertus
)
_SHOWS = re.compile(
    r"\b(?:writes|looks|written|shown|like this|as follows|models?|assistant|Qwen|Hermes|Mistral|Llama)\b"
)
_LEAD_IN = 400
"""Longest text before a call, in characters; an explanation of the form is longer, or names it."""


def calls_tool(text: str, plain: str) -> bool:
    """Return True if an answer is a tool call. `plain`: `text` without code."""
    call = _CALL.search(plain, 0, _LEAD_IN + 40)
    if call is None:
        return False
    lead_in = text[: call.start()].rstrip(" \t")
    if not lead_in.strip():
        return True
    is_set_off = lead_in[-1] in f"\n:{SENTENCE_END}"
    is_shown = speaks_of_marks(lead_in) or _SHOWS.search(lead_in)
    return is_set_off and not is_shown and text.rstrip()[-1] in ">]})"
