"""Control tokens that a server left in an answer: those at its end, and the turns that a model wrote after its own.

A server with a wrong end-of-sequence token sends `Bern.<|im_end|>`, or lets the model go on: `Bern.<|im_end|>` and then
`<|im_start|>user ...`. The answer is what stands before its first end token. Whoever trains on the rest trains on turns
that the model made up, and the tokens are refused by `train/sft.py --check` (train/data/control_tokens.py).

Tokens in code (`<|im_end|>` in backticks, a template in a code block) are what an answer speaks of, and stay.
"""

import re

_PIPED = r"<\|[\w:/.-]{1,40}\|>|<｜[^<>｜\n]{1,40}｜>"
_TOKEN = re.compile(
    rf"<\|close\|>\w+<\|sep\|>|{_PIPED}|</?s>|<(?:start|end)_of_turn>|<end_of_(?:utterance|sentence)>|<turn\|>|<\|turn>"
    r"|<(?:eos|eop|eod|eoa|eot|bos|pad)>|<seed:eos>|<SPECIAL_\d+>|<extra_id_\d+>"
    r"|\[(?:EOS|EOT|/?INST|END FINAL RESPONSE)\]|\[\|endofturn\|\]"
)
_LONGEST = 64
"""Characters at the end of a text in which one token stands."""

_ROLE = r"(?:user|assistant|system|model|tool|human|gpt|developer|ipython|observation)\b"
_TURN = re.compile(
    rf"(?P<header><(?:\|(?:im_start|start_header_id|start_of_role|turn_start|start|begin)\|>\s*{_ROLE}"
    rf"|start_of_turn>\s*{_ROLE}|\|turn>\s*{_ROLE}|\|(?:user|human|assistant|system|observation|prompter)\|>"
    r"|\|im_(?:user|assistant|system)\|>|\|START_OF_TURN_TOKEN\|>|｜(?:User|Assistant)｜>)"
    r"|\[INST\]|\[\|(?:user|assistant|system)\|\])"
    r"|<(?:\|(?:im_end|endoftext|end_of_text|eot_id|eom_id|eot|end|return|endofturn|end_of_turn|END_OF_TURN_TOKEN|eos)"
    r"\|>|end_of_turn>|turn\|>|eos>|｜end▁of▁sentence｜>)"
)
"""What begins another turn, and what ends one."""
_LLAMA_3 = re.compile(r"(?<=[.!?…。！？])assistant\n\n")
"""Its next turn where the special tokens were stripped (llama.cpp#6772)."""
_OWN_HEADER = re.compile(
    r"\s*(?:<\|(?:im_start|start_header_id|start_of_role)\|>assistant(?:<\|(?:end_header_id|end_of_role)\|>|\n)"
    r"|<start_of_turn>model\n|<\|turn>model\n|<\|assistant\|>|<｜Assistant｜>|\[\|assistant\|\]"
    r"|<\|begin_of_solution\|>|<\|START_(?:RESPONSE|TEXT)\|>|<\|open\|>response<\|sep\|>"
    r"|<\|message_model\|>(?:<\|content_text\|>)?|<\|content_text\|>)\s*"
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)


def without_code(text: str) -> str:
    """Return `text` with its code blanked out and every other character at its place."""
    return _CODE.sub(lambda code: " " * len(code[0]), text) if "`" in text else text


def holds_control_tokens(text: str) -> bool:
    """Return whether a text holds what is a control token of some model, in code or out of it."""
    return ("<" in text or "[" in text) and bool(_TOKEN.search(text))


def cut_at_next_turn(text: str) -> tuple[str, bool]:
    """Return the text before the first turn that follows its own, and whether one does."""
    plain = without_code(text)
    header = _OWN_HEADER.match(plain)
    own = header.end() if header else 0
    end = _end_of_words(plain)[0]
    for found in _TURN.finditer(plain, own, end):
        if found["header"] or _ends_turn(plain, found):
            return text[: found.start()].rstrip(), True
    if "assistant\n\n" in plain and (stripped := _LLAMA_3.search(plain, own)):
        return text[: stripped.start()].rstrip(), True
    return text, False


def _ends_turn(text: str, token: re.Match[str]) -> bool:
    """Return whether a token ends a turn: a text that speaks of one has a space or a quote before it."""
    before = text[token.start() - 1 : token.start()]
    return before.isalnum() or before in tuple(".!?…。！？)*_\n>")


def without_end_tokens(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the text without the control tokens at its end and the header before it, and these, from the end.

    What may be a word of the text stays: `</s>` that closes an `<s>` (struck out in HTML), `it ends with <eos>`.
    """
    end, tokens = _end_of_words(text)
    rest = text[:end]
    if header := _OWN_HEADER.match(rest):
        tokens.append(header[0].strip())
        rest = rest[header.end() :]
    return (rest, tuple(tokens)) if tokens else (text, ())


def _is_spoken_of(text: str, token: re.Match[str]) -> bool:
    """Return True where a token that could be HTML or prose is the last word of a sentence without an end."""
    before = text[max(0, token.start() - 3) : token.start()]
    words = before.rstrip(" \t")
    return (
        "|" not in token[0] and "｜" not in token[0] and words != before and (words[-1:].isalnum() or words[-1:] == ":")
    )


def _end_of_words(text: str) -> tuple[int, list[str]]:
    """Return where the words of a text end, before blanks and control tokens, and these tokens, from the end."""
    tokens: list[str] = []
    unopened = text.count("</s>") - text.count("<s>")
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        last = [one for one in _TOKEN.finditer(text, max(0, end - _LONGEST), end) if one.end() == end]
        if not last or (last[0][0] == "</s>" and unopened <= 0) or _is_spoken_of(text, last[0]):
            return end, tokens
        tokens.append(last[0][0])
        unopened += {"<s>": 1, "</s>": -1}.get(tokens[-1], 0)
        end = last[0].start()
