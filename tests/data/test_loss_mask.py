import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from train.data.chat_template import use_template
from train.data.formats import Conversation, RowFault
from train.data.loss_mask import NOT_TRAINED, encode
from train.data.tokenize import tokenize
from train.errors import UserError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi\nthere"},
    {"role": "assistant", "content": "Hello 😀 you"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


def trained_text(tokenizer, encoded) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != NOT_TRAINED])


def test_answers_and_their_end_tokens_are_trained_and_nothing_else(chatml_tokenizer) -> None:
    (encoded,) = encode(chatml_tokenizer, TURNS)
    assert encoded.input_ids == chatml_tokenizer.apply_chat_template(TURNS, return_dict=False)
    assert trained_text(chatml_tokenizer, encoded) == "Hello 😀 you<|im_end|>So long<|im_end|>"
    assert all(label in (NOT_TRAINED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


def test_last_trains_the_last_answer_alone(chatml_tokenizer) -> None:
    (encoded,) = encode(chatml_tokenizer, TURNS, train_on="last")
    assert trained_text(chatml_tokenizer, encoded) == "So long<|im_end|>"


def test_a_message_that_says_so_is_not_trained(chatml_tokenizer) -> None:
    messages = [*TURNS[:2], {**TURNS[2], "train": False}, *TURNS[3:]]
    (encoded,) = encode(chatml_tokenizer, messages)
    assert encoded.input_ids == encode(chatml_tokenizer, TURNS)[0].input_ids
    assert trained_text(chatml_tokenizer, encoded) == "So long<|im_end|>"


def test_mistral_ids_are_those_of_prompt_and_answer_tokenized_apart(mistral_tokenizer_v1) -> None:
    """Janus' own code encoded the prompt, the answer (which gets a prefix space) and the end token one by one."""
    tokenizer = mistral_tokenizer_v1()
    use_template(tokenizer, "mistral-system")
    (encoded,) = encode(tokenizer, TURNS[:3])
    apart = [
        tokenizer.encode(text, add_special_tokens=False)
        for text in ("[INST] Be brief.\nHi\nthere [/INST]", "Hello 😀 you")
    ]
    prompt, answer = [tokenizer.bos_token_id, *apart[0]], [*apart[1], tokenizer.eos_token_id]
    assert encoded.input_ids == prompt + answer
    assert encoded.labels == [NOT_TRAINED] * len(prompt) + answer


@pytest.fixture(scope="module")
def joining_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that has learnt a token for two line breaks, as those of Llama 3 and Qwen have."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    backend.train_from_iterator(["assistant", "user", "a\n\nb", "\n\n", "\n \n"] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@pytest.mark.parametrize("answer", ["\nfoo", "\n\nfoo", " foo", "\n", "\n \n x", "foo\n", "😀\n\n"])
def test_an_answer_that_begins_with_white_space_is_what_the_model_will_write(joining_tokenizer, answer: str) -> None:
    """A token for two line breaks would reach over the border; at inference the prompt's own stands there already."""
    use_template(joining_tokenizer, "chatml")
    assert len(joining_tokenizer("\n\n").input_ids) == 1
    messages = [TURNS[1], {"role": "assistant", "content": answer}, *TURNS[3:]]
    (encoded,) = encode(joining_tokenizer, messages)
    prompt = joining_tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[: len(prompt)] == [NOT_TRAINED] * len(prompt)
    assert trained_text(joining_tokenizer, encoded) == answer + "<|im_end|>So long<|im_end|>"
    assert joining_tokenizer.decode(encoded.input_ids) == joining_tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_a_template_without_marks_is_refused(tokenizer) -> None:
    with pytest.raises(UserError, match=r"no \{% generation %\} marks"):
        encode(tokenizer, TURNS)


TEMPLATES_THAT_LOSE_SOMETHING = {
    "system message lost by the template": "{% if m.role == 'user' %}{{ m.content }}{% elif m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endif %}",
    "user message lost by the template": "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endif %}",
    "answer lost by the template": "{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% generation %}{{ 'no' + '<|im_end|>' }}{% endgeneration %}{% endif %}",
    "end token not marked by the template": "{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endif %}",
    "not marked by the template": "{{ m.content }}{% if m.role == 'tool' %}"
    "{% generation %}{% endgeneration %}{% endif %}",
    "refused by the template": "{{ raise_exception('not this one') }}{% generation %}{% endgeneration %}",
}


@pytest.mark.parametrize("kind", TEMPLATES_THAT_LOSE_SOMETHING)
def test_a_template_that_loses_something_is_caught_by_the_row(kind: str, tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}" + TEMPLATES_THAT_LOSE_SOMETHING[kind] + "{% endfor %}"
    with pytest.raises(RowFault) as caught:
        encode(tokenizer, TURNS[:3])
    assert caught.value.kind == kind


def test_batches_give_what_single_rows_give(chatml_tokenizer) -> None:
    turns = [TURNS, TURNS[:3], TURNS[1:], [*TURNS[:2], {"role": "assistant", "content": "\n\nYes"}]]
    bad = [{"role": "tool", "content": "42"}, *TURNS[1:]]
    conversations = [Conversation(messages, None, 0, f"row {row}") for row, messages in enumerate([*turns, bad])]
    results = list(tokenize(chatml_tokenizer, conversations, "assistant"))
    assert [conversation.place for conversation, _ in results] == [f"row {row}" for row in range(5)]
    assert [result for _, result in results[:4]] == [encode(chatml_tokenizer, messages)[0] for messages in turns]
    fault = results[4][1]
    assert isinstance(fault, RowFault)
    assert "no turn for the role tool" in fault.detail
