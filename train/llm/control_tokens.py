"""Control tokens that a server left in an answer: those at its end, and the turns that a model wrote after its own.

A server with a wrong end-of-sequence token sends `Bern.<|im_end|>`, or lets the model go on: `Bern.<|im_end|>` and then
`<|im_start|>user ...`. The answer is what stands before its first end token. Whoever trains on the rest trains on turns
that the model made up, and the tokens are refused by `train/sft.py --check` (train/data/control_tokens.py).

Tokens in code (`<|im_end|>` in backticks, a template in a code block) are what an answer speaks of, and stay.
"""

import re

_TOKEN = re.compile(
    r"<\|close\|>\w+<\|sep\|>|<\|[\w:/.-]{1,40}\|>|<｜[^<>｜\n]{1,40}｜>|</?s>|<turn\|>|<\|turn>"
    r"|<(?:start|end)_of_(?:turn|utterance|sentence|text|message)>|<(?:eos|eop|eod|eoa|eot|eom|bos|pad|unk|EOS|EOT)>"
    r"|<seed:eos>|<(?:SPECIAL_|extra_id_|reserved_|unused|ctrl)\d+>|\[unused\d+\]|\[\|endofturn\|\]"
    r"|\[(?:EOS|EOT|/?INST|END FINAL RESPONSE)\]|<\|(?:im_end|eot_id|endoftext|end_of_text|end|return)\|?\Z"
)
_LONGEST = 64
"""Characters at the end of a text in which one token stands."""

_ROLE = r"\s*(?:user|assistant|system|model|tool|human|gpt|developer|ipython|observation)\b"
_TURN = re.compile(
    r"<(?:\|(?:im_start|start_header_id|start_of_role|turn_start|start|begin)\|>"
    rf"{_ROLE}|start_of_turn>{_ROLE}|\|turn>{_ROLE}|\|(?:user|human|assistant|system|observation|prompter)\|>"
    r"|\|im_(?:user|assistant|system)\|>|\|START_OF_TURN_TOKEN\|>|｜(?:User|Assistant)｜>"
    r"|\|(?:im_end|endoftext|end_of_text|eot_id|eom_id|eot|end|return|endofturn|end_of_turn|END_OF_TURN_TOKEN|eos)\|>"
    r"|end_of_turn>|turn\|>|eos>|/s>|｜end▁of▁sentence｜>)"
    r"|\[INST\]|\[\|(?:user|assistant|system)\|\]"
)
"""What begins another turn or ends one."""
_LLAMA_3 = re.compile(r"(?<=[.!?…。！？])assistant\n\n")
"""Its next turn where the special tokens were stripped (llama.cpp#6772)."""
_OWN_HEADER = re.compile(
    r"\s*(?:<\|(?:im_start|start_header_id|start_of_role)\|>assistant(?:<\|(?:end_header_id|end_of_role)\|>|\n)"
    r"|<start_of_turn>model\n|<\|turn>model\n|<\|assistant\|>|<｜Assistant｜>|\[\|assistant\|\]"
    r"|<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>|<\|im_assistant\|>assistant<\|im_middle\|>"
    r"|<\|begin_of_solution\|>|<\|START_(?:RESPONSE|TEXT)\|>|<\|open\|>response<\|sep\|>"
    r"|<\|message_model\|>(?:<\|content_text\|>)?|<\|content_text\|>)\s*"
)
_SENTENCE_END = ".!?…。！？"
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
    end = _end_of_words(plain)[0]
    for found in _TURN.finditer(plain, 0, end):
        is_html = found[0] == "</s>" and plain.count("</s>") <= plain.count("<s>")
        if not is_html and not _is_word(plain, found):
            return text[: found.start()].rstrip(), True
    if "assistant\n\n" in plain and (stripped := _LLAMA_3.search(plain)):
        return text[: stripped.start()].rstrip(), True
    return text, False


def without_header(text: str) -> tuple[str, str]:
    """Return the text without the header of its turn or the mark that opens its answer, and that header."""
    header = _OWN_HEADER.match(text)
    return (text[header.end() :], header[0].strip()) if header else (text, "")


def without_end_tokens(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the text without the control tokens at its end, and these from the end.

    What may be a word of the text stays: `</s>` that closes an `<s>` (struck out in HTML), `it ends with <eos>`.
    """
    end, tokens = _end_of_words(text)
    return (text[:end], tuple(tokens)) if tokens else (text, ())


def _is_word(text: str, token: re.Match[str]) -> bool:
    """Return True where a text speaks of a token: it stands after a space and a word, a quote or a bracket."""
    if text[token.end() : token.end() + 1] in tuple(",;:)\"'”’»"):
        return True
    before = text[max(0, token.start() - 3) : token.start()]
    words = before.rstrip(" \t")
    if words == before:
        return bool(before) and not (before[-1].isalnum() or before[-1] in f"{_SENTENCE_END})*_\n>]")
    return words[-1:] not in tuple(f"{_SENTENCE_END}>]\n")


def _end_of_words(text: str) -> tuple[int, list[str]]:
    """Return where the words of a text end, before blanks and control tokens, and these tokens, from the end."""
    tokens: list[str] = []
    unopened = text.count("</s>") - text.count("<s>")
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        last = [one for one in _TOKEN.finditer(text, max(0, end - _LONGEST), end) if one.end() == end]
        if not last or (last[0][0] == "</s>" and unopened <= 0):
            return end, tokens
        if _is_word(text, last[0]) and ("|" not in last[0][0] or _TOKEN.search(text, 0, last[0].start())):
            return end, tokens
        tokens.append(last[0][0])
        unopened += {"<s>": 1, "</s>": -1}.get(tokens[-1], 0)
        end = last[0].start()
