"""Control tokens around an answer, and further turns after it.

A server with a wrong end-of-sequence token sends `Bern.<|im_end|>`, or lets the model continue: `Bern.<|im_end|>` and
then `<|im_start|>user ...`. Training on the rest would train on invented turns, and `train/sft.py --check` refuses the
tokens (train/data/chat/control_tokens.py).

- Tokens at the beginning and at the end are removed: those of the tables here, and no others.
- The text is cut at the header of another turn, with the name of its role.
- Every other token stays, and is counted: an answer may speak of it, show it or list it (mentions.py, code_spans.py).
"""

import re

from train.llm.reasoning.code_spans import blank_code
from train.llm.reasoning.mentions import is_announced, is_named, is_named_after, is_word

_TOKEN = re.compile(
    r"<\|close\|>\w+<\|sep\|>|<\|[\w:/.-]{1,40}\|>|<｜[^<>｜\n]{1,40}｜>|</?s>|<turn\|>|<\|turn>"
    r"|<(?:start|end)_of_(?:turn|utterance|sentence|text|message)>|<(?:eos|eop|eod|eoa|eot|eom|bos|pad|unk|EOS|EOT)>"
    r"|<seed:eos>|<(?:SPECIAL_|extra_id_|reserved_|unused|ctrl)\d+>|\[unused\d+\]|\[\|endofturn\|\]"
    r"|\[(?:EOS|EOT|/?INST|END FINAL RESPONSE)\]|\[e~\[|\]~!?b[\]\[]|<\|(?:im_end|eot_id|endoftext|end_of_text)\|?\Z"
)
"""Anything that looks like a control token: counted if it remains."""

_ENDS = (
    r"<\|(?:im_end|im_start|eot_id|eom_id|eod_id|eot|eom|eos|eoa|eod|EOT|EOS|end|return|call|endoftext|endofturn"
    r"|endofassistant|endofprompt|end_of_(?:text|turn|sentence|msg|message|solution|response|box|document|assistant)"
    r"|end_message|END_(?:OF_TURN_TOKEN|RESPONSE|TEXT)|assistant_end|user|observation|pad|padding|file_separator"
    r"|finetune_right_pad_id|im_sep|content_end)\|>"
    r"|<\|close\|>(?:response|think)<\|sep\|>|<｜(?:end▁of▁sentence|end of sentence|User)｜>|</s>|<s>|<turn\|>"
    r"|<end_of_(?:turn|utterance|sentence|text|message)>|<(?:eos|eop|eod|eoa|eot|eom|bos|pad|unk|EOS|EOT)>|<seed:eos>"
    r"|<(?:SPECIAL_|extra_id_|reserved_|unused|ctrl)\d+>|\[unused\d+\]|\[\|endofturn\|\]"
    r"|\[(?:EOS|EOT|/?INST|END FINAL RESPONSE)\]|\[e~\["
)
"""Tokens that end a model's turn, and padding."""
_END = re.compile(rf"(?:{_ENDS}|<\|(?:im_end|eot_id|endoftext|end_of_text|end|return)\|?)\Z")
_END_OF_TURN = re.compile(_ENDS)
_LONGEST = 64
"""Characters at the end of a text that are searched for a token."""

_BEGINS = re.compile(
    r"\s*(?:<s>|<bos>|<BOS_TOKEN>|<\|(?:begin_of_text|begin_of_sentence|startoftext|bos|BOS|bom|begin_of_box)\|>"
    r"|<｜begin▁of▁sentence｜>|<\|endoftext\|>(?=\S)|(?:\[gMASK\])?<sop>|\[/INST\]|\]~!b\[|\]~b\]ai\n?"
    r"|<\|(?:im_start|start_header_id|start_of_role)\|>assistant(?:<\|(?:end_header_id|end_of_role)\|>|\n)"
    r"|<start_of_turn>model\n|<\|turn>model\n|<\|assistant\|>|<｜Assistant｜>|\[\|assistant\|\]"
    r"|<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>|<\|im_assistant\|>assistant<\|im_middle\|>"
    r"|<\|begin_of_solution\|>|<\|START_(?:RESPONSE|TEXT)\|>|<\|open\|>response<\|sep\|>"
    r"|<\|message_model\|>(?:<\|content_text\|>)?|<\|content_text\|>)\s*"
)
"""Tokens that open a text, a turn or an answer."""

_ROLE = r"\s*(?:user|assistant|system|model|tool|human|gpt|developer|ipython|observation)\b"
_TURN = re.compile(
    rf"(?:(?:{_ENDS})\s*){{0,8}}(?:<(?:\|(?:im_start|start_header_id|start_of_role|turn_start|start|begin)\|>{_ROLE}"
    rf"|start_of_turn>{_ROLE}|\|turn>{_ROLE}|\|(?:user|human|assistant|system|observation|prompter)\|>"
    r"|\|im_(?:user|assistant|system)\|>|\|START_OF_TURN_TOKEN\|>|｜(?:User|Assistant)｜>)"
    rf"|\[INST\]|\[\|(?:user|assistant|system)\|\]|\]~b\]{_ROLE})"
    rf"|(?:(?:{_ENDS})\s*){{1,8}}(?:#+\s*)?(?:(?:Human|User|USER|Assistant|ASSISTANT|Question|Instruction)\s*:"
    r"|(?:user|assistant|model|human)\s*\n|<\|begin_of_text\|>)"
)
"""The header of another turn, after tokens that end one."""
_LLAMA_3 = re.compile(r"(?<=[.!?…。！？)\]}”’»])assistant\n\n|(?<=\S[\"'*`])assistant\n\n")
"""Its next turn with the special tokens stripped (llama.cpp#6772)."""
_TURNS_OF_WORDS = re.compile(
    r"\n[#* ]*(?:Human|User|USER|user|human)\**[ ]*(?::|\n).*\n[#* ]*(?:Assistant|ASSISTANT|assistant|model)\**[ ]*"
    r"(?::|\n)|[^\W_]assistant\n\n",
    re.DOTALL,
)


def holds_control_tokens(text: str) -> bool:
    """Return True if a text holds a control token of some model, in code or outside of it."""
    return ("<" in text or "[" in text) and bool(_TOKEN.search(text))


def holds_turns(text: str) -> bool:
    """Return True if lines of a text look like further turns: it ran on past its end, or is a dialogue."""
    may_hold = "ssistant" in text or "SSISTANT" in text or "\nmodel\n" in text
    return may_hold and bool(_TURNS_OF_WORDS.search(text))


def cut_at_next_turn(text: str) -> tuple[str, bool]:
    """Return the text before the first further turn, and True if there is one.

    A turn that the text announces or begins with is an example, and so are those after it.
    """
    plain = blank_code(text)
    for turn in _TURN.finditer(plain):
        if not text[: turn.start()].strip() or is_announced(text, turn.start()):
            return text, False
        ends_one = _END_OF_TURN.match(turn[0]) and text[turn.end() : turn.end() + 1] not in tuple("\"'”’»)")
        if not (is_named if ends_one else is_word)(text, *turn.span()):
            if not text[turn.end() :].strip() and _END.search(turn[0]):
                break  # tokens at the end of the text
            return text[: turn.start()].rstrip(), True
    if "assistant\n\n" in plain and (stripped := _LLAMA_3.search(plain)):
        return text[: stripped.start()].rstrip(), True
    return text, False


def strip_header(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the text without the tokens at its beginning, and the tokens."""
    tokens: list[str] = []
    end = 0
    while header := _BEGINS.match(text, end):
        is_struck_out = header[0].strip() == "<s>" and text.rstrip().find("</s>") not in (-1, len(text.rstrip()) - 4)
        if is_struck_out or is_named_after(text, header.end() - (header[0][-1].isspace())):
            break
        tokens.append(header[0].strip())
        end = header.end()
    return (text[end:], tuple(tokens)) if tokens else (text, ())


def strip_end_tokens(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the text without the control tokens at its end, and the tokens, the last one first.

    Those that may be words of the text stay: `</s>` that closes an `<s>` (struck out in HTML), `it ends with <eos>`,
    and tokens after a colon or a list marker.
    """
    tokens: list[str] = []
    unopened = text.count("</s>") - text.count("<s>")
    end = _end_of_text(text, len(text))
    while token := _END.search(text, max(0, end - _LONGEST), end):
        if is_announced(text, token.start()):
            return text, ()
        if (token[0] == "</s>" and unopened <= 0) or _is_word(text, token.start(), token.end()):
            break
        tokens.append(token[0])
        unopened += {"<s>": 1, "</s>": -1}.get(token[0], 0)
        end = _end_of_text(text, token.start())
    return (text[:end], tuple(tokens)) if tokens else (text, ())


def _end_of_text(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _is_word(text: str, start: int, end: int) -> bool:
    """Return True if the last token of a text is a word of it.

    One with bars rarely is: as the only token of a text it may follow a space.
    """
    is_only_token = "|" in text[start:end] and _TOKEN.search(text, 0, start) is None
    return is_named(text, start, end) or (is_word(text, start, end) and not is_only_token)
