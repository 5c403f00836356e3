"""Chat templates of many kinds, and a tokenizer with little more than their special tokens."""

import re
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

CONTROL = re.compile(
    r"<[|｜][^<>\s{}'\"]+[|｜]>|</?s>|<(?:start_of_turn|end_of_turn|end_of_utterance|sop)>|\[gMASK\]"
    r"|<\|?(?:turn|tool_call|tool_response|channel)\|?>"
)
"""Control tokens in TRL's templates."""
TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# Mistral 7B Instruct v0.1 of the hub: raises for a system message, because the roles don't alternate then.
MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# mistral-common from v3 on: system message in the LAST user turn.
MISTRAL_V3 = (
    "{%- set system = '' -%}{%- set chat = messages -%}{%- if messages[0].role == 'system' -%}"
    "{%- set system = messages[0].content + '\n\n' -%}{%- set chat = messages[1:] -%}{%- endif -%}"
    "{%- set last = (chat | selectattr('role', 'equalto', 'user') | list)[-1] -%}{{- bos_token -}}"
    "{%- for message in chat -%}{%- if message.role == 'user' -%}"
    "{{- '[INST] ' + (system if message is sameas last or message == last else '') + message.content + '[/INST]' -}}"
    "{%- elif message.role == 'assistant' -%}{{- ' ' + message.content + eos_token -}}"
    "{%- else -%}{{- raise_exception('Only user and assistant roles are supported') -}}{%- endif -%}{%- endfor -%}"
)
# Mistral Small (v7): a turn for the system message.
MISTRAL_V7 = (
    "{{- bos_token -}}{%- for message in messages -%}{%- if message.role == 'system' -%}"
    "{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' -}}{%- elif message.role == 'user' -%}"
    "{{- '[INST]' + message.content + '[/INST]' -}}{%- else -%}{{- message.content + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
# Llama 2: BOS before every exchange, system message in the first user turn.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set chat = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set chat = messages %}{% set system = false %}{% endif %}{% for message in chat %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('Only one system message, at the start') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Vicuna, but the system message is dropped without an error.
IGNORES = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' + message.content + '\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + eos_token + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Default system message in a variable; an empty system message renders no turn.
DEFAULT_IN_VARIABLE = (
    "{% set ns = namespace(system='You are ' + 'Al.') %}{% for m in messages if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endfor %}{% if ns.system %}{{ '<|system|>\n' + ns.system + '<|end|>\n' }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
)
INLINE = {
    "mistral v1": MISTRAL_V1,
    "mistral v3": MISTRAL_V3,
    "mistral v7": MISTRAL_V7,
    "llama 2": LLAMA_2,
    "ignores": IGNORES,
    "default in a variable": DEFAULT_IN_VARIABLE,
}


def tokenizer_with(template: str, bos: str = "<s>", eos: str = "</s>", special: tuple[str, ...] = ()) -> Any:
    """Return a tokenizer with only special tokens, and a template of TRL or of this module."""
    backend = Tokenizer(models.WordLevel({"unknown": 0}, unk_token="unknown"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    text = INLINE.get(template) or (TRL_TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = text
    return tokenizer


def say(*turns: str) -> list[dict[str, Any]]:
    """Return messages parsed from texts such as "user: Hi"."""
    return [{"role": role, "content": text} for role, _, text in (turn.partition(": ") for turn in turns)]


def text_of(tokenizer: Any, *turns: str, **options: Any) -> str:
    return tokenizer.apply_chat_template(say(*turns), tokenize=False, **options)
