"""Assistant spans, compared with the marks of TRL's training templates and with the prompts of inference."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import trl
from chat_templates import CONTROL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from train.data.chat.assistant_spans import SpanFinder
from train.data.loss_mask import NOT_TRAINED, Encoder
from train.data.sources.formats import RowError
from train.errors import UserError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PAIRS = sorted(path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja"))

# What each model stops at, as its generation_config.json has it: not taken from the code under test.
STOPS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "idefics3": "<end_of_utterance>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "smolvlm": "<end_of_utterance>",
    **{f"gemma4{version}": ("<turn|>", "<|tool_response>") for version in ("", "_v2", "_v3", "_v4", "_v5")},
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
}
EOS = {"phi3": "<|endoftext|>", "phi3_5": "<|endoftext|>", "glm4moe": "<|endoftext|>"}

BLANK = "marks the blank after the end token, where generation has stopped"
HEADER = "marks text that the generation prompt holds already"
REWRITTEN = "its one row holds earlier answers as they are rewritten, not as they are to be written"
NO_PROMPT = "marks answers that never follow the generation prompt, which ends with <think>; ours refuses them by name"
TOOL_HEADER = "leaves out the header that this template has the model write after a tool's result"
TOOL_END = "leaves out the token after a call, at which the server stops to call the tool"
EOT = "marks <|endoftext|> after the end token, where generation has stopped"
EXCEPTIONS: dict[str, set[str]] = {
    "deepseek_r1_distill": {NO_PROMPT},
    "deepseekv3": {NO_PROMPT},
    "diffusion_gemma": {BLANK, REWRITTEN, TOOL_HEADER, TOOL_END},
    "gemma": {BLANK},
    "gemma3": {BLANK},
    "glm4moe": {REWRITTEN},
    "gptoss": {HEADER, REWRITTEN},
    "idefics3": {BLANK},
    "lfm2": {BLANK},
    "lfm2_v2": {BLANK},
    "muse_glimmer": {HEADER},
    "nemotron_3_5_lightning": {BLANK, HEADER, REWRITTEN},
    "nemotron_3_nano": {BLANK, HEADER, REWRITTEN},
    "nemotron_3_super": {BLANK, HEADER, REWRITTEN},
    "nemotron_3_ultra": {BLANK, HEADER, REWRITTEN},
    "phi3": {BLANK, EOT},
    "phi3_5": {BLANK, EOT},
    "qwen2_5": {BLANK, HEADER},
    "qwen2_5_vl": {BLANK},
    "qwen3": {BLANK, REWRITTEN},
    "qwen3_5_nothink": {BLANK, HEADER, REWRITTEN},
    "qwen3_5_think": {BLANK, HEADER, REWRITTEN},
    "qwen3_6": {BLANK, HEADER, REWRITTEN},
    "qwen3_8": {BLANK, HEADER},
    "qwen3_instruct_2507": {BLANK},
    "qwen3_vl": {BLANK},
    "smolvlm": {BLANK},
}
"""The reasons why our spans differ from the marks of TRL's training templates."""

SYSTEMS = (None, "Be brief.", "You are the user's\n\nassistant 😀")
CONTENTS = ("Hello", "", "one\n\n  two\nthree", "𝔘𝔫𝔦 😀 𐍈 é", "user\nassistant: system", "  padded \n", "model")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "Its name."}},
                "required": ["town"],
            },
        },
    }
]


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def conversations():
    for system, turns, first in itertools.product(SYSTEMS, range(1, 5), range(len(CONTENTS))):
        head = [{"role": "system", "content": system}] if system else []
        contents = itertools.islice(itertools.cycle(CONTENTS), first, first + turns)
        yield head + [m for number, text in enumerate(contents) for m in (user(f"Ask {number}?"), answer(text))], None
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "get_weather", "arguments": {"town": "Köln"}}}
    result = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "rain"}
    asked = [user("Weather?"), answer("", tool_calls=[call]), result, answer("It rains.")]
    yield asked, TOOLS
    yield [{"role": "system", "content": "Be brief."}, *asked, user("Thanks"), answer("Welcome\n")], TOOLS
    yield [user("Ask?"), answer("Hello", reasoning_content="Well, hm.")], None
    yield (
        [user("Ask?"), answer("Hello", reasoning_content="Hm."), user("So?"), answer("Yes", reasoning_content="Oh.")],
        None,
    )


def tokenizer_for(name: str, template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and the control tokens in the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    stop = STOPS.get(name, "<|im_end|>")
    control = [AddedToken(token, special=True) for token in sorted(set(CONTROL.findall(template)))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token=EOS.get(name, stop if isinstance(stop, str) else stop[0]),
        additional_special_tokens=control,
    )
    tokenizer.chat_template = template
    return tokenizer


def rendered(name, tokenizer, messages, tools, **options):
    """Render as a server does; return the marks of a training template too, adjacent ones joined."""
    if name in ("idefics3", "llava_next", "smolvlm"):
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    marked = "generation %}" in tokenizer.chat_template
    texts, marks = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=marked,
        **options,
        **tokenizer.special_tokens_map,
    )
    joined: list[tuple[int, int]] = []
    for start, end in marks[0] if marked else []:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif end > start:
            joined.append((start, end))
    return texts[0], joined


def prompts(name, tokenizer, messages, tools):
    """Yield every prompt that a server can give the model before its next turn."""
    for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        yield rendered(name, tokenizer, messages, tools, add_generation_prompt=True, **options)[0]


def check_against_inference(name, tokenizer, messages, tools, number, row, span) -> None:
    """Check that a prompt precedes the span, prompt and span are the turn, and the span ends with a stop token."""
    before, written = row[: span[0]], row[slice(*span)]
    assert before in prompts(name, tokenizer, messages[:number], tools)
    turn = rendered(name, tokenizer, messages[: number + 1], tools)[0]
    assert written.endswith(STOPS.get(name, "<|im_end|>"))
    rest = turn.removeprefix(before + written)
    if name == "glm4moe":  # the next turn's token ends this one
        assert (before + written).startswith(turn)
        assert before + written in (turn + "<|user|>", turn + "<|observation|>")
    else:
        assert turn.startswith(before + written)
        assert rest in ("", "\n", " ", "\n<|endoftext|>")


def differences(ours: str, mark: str, before: str) -> set[str]:
    """Return the reasons why our span differs from TRL's mark of the same turn. `before`: the text before our span."""
    reasons = set()
    headers = ("<|start|>assistant", "<think>\n\n</think>\n\n", "<think></think>", "<think>\n", "<think>", "\n")
    for header in headers if mark != ours else ():
        if mark.startswith(header) and not ours.startswith(header) and before.endswith(header):
            mark, reasons = mark.removeprefix(header), reasons | {HEADER}
            break
    if ours.startswith("<|turn>model\n"):
        ours, reasons = ours.removeprefix("<|turn>model\n"), reasons | {TOOL_HEADER}
    if ours.endswith("<tool_call|><|tool_response>"):
        ours, reasons = ours.removesuffix("<|tool_response>"), reasons | {TOOL_END}
    for rest, reason in (("\n<|endoftext|>", EOT), ("\n", BLANK)):
        if mark == ours + rest:
            mark, reasons = ours, reasons | {reason}
    return reasons if mark == ours else reasons | {REWRITTEN}


def compare(name, plain, training, spans, messages, tools) -> set[str] | None:
    """Check our spans of a conversation, and return why they differ from TRL's; None if the templates refuse it."""
    try:
        text, marks = rendered(name, training, messages, tools)
    except (TemplateError, TypeError):
        with pytest.raises(RowError, match="refused by the template"):
            spans.rows(messages, tools, "assistant")
        return None
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        rows = spans.rows(messages, tools, "assistant")
    except RowError as error:
        # Nothing is refused that could be compared: the render itself lacks what the message says.
        turn = rendered(name, plain, messages, tools)[0]
        calls = any(message.get("tool_calls") for message in messages)
        is_lost = (calls and "Köln" not in turn.rpartition("Weather?")[2]) or (
            "hm." in str(messages) and "hm." not in turn
        )
        is_lost = is_lost or ("Hm." in str(messages) and "Oh." not in turn)
        if not is_lost:
            raise AssertionError("a conversation is refused that could be compared") from error
        return None
    ours = sorted(((row.text, span) for row in rows for span in row.spans), key=lambda pair: pair[1])
    assert len(ours) == len(answers)
    for number, (row, span) in zip(answers, ours, strict=True):
        check_against_inference(name, plain, messages, tools, number, row, span)
    if len(rows) == 1 and rows[0].text == text and rows[0].spans == marks:
        return set()
    assert len(marks) == len(answers)
    reasons = set()
    for (row, span), mark in zip(ours, marks, strict=True):
        reasons |= differences(row[slice(*span)], text[slice(*mark)], row[: span[0]])
    if [row.text for row in rows] != [text] and not (name == "glm4moe" and text == rows[0].text):
        reasons.add(REWRITTEN)
    if REWRITTEN in reasons:  # so TRL's text lacks what stands before and in one of the answers at inference
        assert not all(text.startswith(row[: span[1]]) for row, span in ours)
    return reasons


@pytest.fixture(scope="module")
def counts():
    counts: Counter[str] = Counter()
    yield counts
    print(f"\n{dict(counts)}")
    for name, reasons in EXCEPTIONS.items():
        print(f"{name}: TRL {'; '.join(sorted(reasons))}")


@pytest.mark.parametrize("name", PAIRS)
def test_spans_differ_from_trls_only_for_the_known_reasons(name: str, counts) -> None:
    plain = tokenizer_for(name, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    training = tokenizer_for(name, (TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8"))
    counts["pairs"] += 1
    if EXCEPTIONS.get(name) == {NO_PROMPT}:
        with pytest.raises(UserError, match="generation prompt continues with '<think>"):
            SpanFinder(plain)
        messages = [user("Ask?"), answer("Hello")]
        text, marks = rendered(name, training, messages, None)
        assert all(not text.startswith(prompt) for prompt in prompts(name, training, messages[:1], None))
        assert text[slice(*marks[0])].startswith("<｜Assistant｜>")  # TRL trains the header of the prompt, too
        all_reasons = {NO_PROMPT}
        counts["conversations refused"] += len(list(conversations()))
    else:
        spans, all_reasons = SpanFinder(plain), set()
        for messages, tools in conversations():
            reasons = compare(name, plain, training, spans, messages, tools)
            counts["conversations refused" if reasons is None else "conversations compared"] += 1
            counts["that differ"] += bool(reasons)
            all_reasons |= reasons or set()
    counts["templates that differ"] += bool(all_reasons)
    assert all_reasons == EXCEPTIONS.get(name, set())


OTHERS = sorted({path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training")} - set(PAIRS))


@pytest.mark.parametrize("name", OTHERS)
def test_other_templates_train_the_text_that_follows_the_prompt_at_inference(name: str, counts) -> None:
    tokenizer = tokenizer_for(name, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    spans = SpanFinder(tokenizer)
    refused = 0
    for messages, tools in conversations():
        try:
            rows = spans.rows(messages, tools, "assistant")
        except RowError as error:
            assert "reasoning lost" in error.kind and messages[1].get("reasoning_content"), error  # noqa: PT017, PT018
            refused += 1
            continue
        counts["conversations of other templates"] += 1
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        ours = sorted(((row.text, span) for row in rows for span in row.spans), key=lambda pair: pair[1])
        for number, (row, span) in zip(answers, ours, strict=True):
            check_against_inference(name, tokenizer, messages, tools, number, row, span)
    assert refused <= 2


MARKED = [name for name in PAIRS if NO_PROMPT not in EXCEPTIONS.get(name, set())]


@pytest.mark.parametrize("name", MARKED)
def test_marks_are_trimmed_to_what_the_plain_template_gives(name: str) -> None:
    """With TRL's marks, spans are not longer than without them, and end with the same token."""
    plain = SpanFinder(tokenizer_for(name, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")))
    marked = SpanFinder(tokenizer_for(name, (TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8")))
    messages = [user("Ask?"), answer("Hello"), user("So?"), answer("one\n\ntwo"), user("And?"), answer("")]
    ours = [row.text[slice(*span)] for row in plain.rows(messages, None, "assistant") for span in row.spans]
    texts = [row.text[slice(*span)] for row in marked.rows(messages, None, "assistant") for span in row.spans]
    assert "".join(texts) == "".join(ours)


@pytest.mark.parametrize("name", PAIRS)
def test_stop_tokens_are_those_of_the_models_generation_settings(name: str) -> None:
    stops = STOPS.get(name, "<|im_end|>")
    expected = [stops] if isinstance(stops, str) else [*stops]
    if name == "deepseek_r1_distill":
        expected.append("<｜tool▁call▁end｜>")  # this template has nothing more after a call, not even eos
    plain, training = (
        tokenizer_for(name, (TEMPLATES / f"{name}{kind}.jinja").read_text(encoding="utf-8"))
        for kind in ("", "_training")
    )
    assert SpanFinder(training).stop_tokens == expected
    if NO_PROMPT not in EXCEPTIONS.get(name, ()):
        assert SpanFinder(plain).stop_tokens == expected


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\ue000\ue001"), min_size=1, max_size=40)
SPOKEN = TEXT.filter(str.strip)
PROPERTY = ("qwen3", "qwen3_5_nothink", "phi3", "llama3", "glm4moe", "gptoss", "gemma3", "qwen2_5_training")


@pytest.fixture(scope="module")
def encoders():
    encoders = {}
    for name in PROPERTY:
        tokenizer = tokenizer_for(
            name.removesuffix("_training"), (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        )
        encoders[name] = (tokenizer, Encoder(tokenizer))
    return encoders


WRITTEN = {
    "qwen3": ("<think>\n\n</think>\n\n{}<|im_end|>", lambda text: text.lstrip("\n")),
    "qwen3_5_nothink": ("{}<|im_end|>", str.strip),
    "phi3": ("{}<|end|>", str),
    "llama3": ("{}<|eot_id|>", str.strip),
    "glm4moe": ("\n<think></think>\n{}<|user|>", str.strip),
    "gptoss": ("<|channel|>final<|message|>{}<|return|>", str),
    "gemma3": ("{}<end_of_turn>", str.strip),
    "qwen2_5_training": ("{}<|im_end|>", str),
}
"""The text that the model writes for an answer, taken from the templates by hand."""


@given(
    system=st.none() | SPOKEN,
    turns=st.lists(st.tuples(SPOKEN, SPOKEN, st.booleans()), min_size=1, max_size=4).filter(
        lambda turns: any(trained for _, _, trained in turns)
    ),
    last=st.booleans(),
    name=st.sampled_from(PROPERTY),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_trained_tokens_are_the_answers_and_all_tokens_are_the_render(encoders, system, turns, last, name) -> None:
    tokenizer, encoder = encoders[name]
    messages = [{"role": "system", "content": system}] if system else []
    for question, spoken, trained in turns:
        messages += [user(question), answer(spoken, train=trained)]
    (rows,) = encoder.encode([(messages, None)], "last" if last else "assistant")
    assert not isinstance(rows, RowError), rows
    form, change = WRITTEN[name]
    expected = [form.format(change(spoken)) for _, spoken, trained in turns if trained]
    trained_texts = []
    for row in rows:
        assert len(row.labels) == len(row.input_ids)
        assert all(label in (NOT_TRAINED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
        trained_texts.append(tokenizer.decode([label for label in row.labels if label != NOT_TRAINED]))
        text = tokenizer.decode(row.input_ids)
        prefixes = [rendered(name, tokenizer, messages[:end], None)[0] for end in range(2, len(messages) + 1)]
        assert text in prefixes or (name == "glm4moe" and text.removesuffix("<|user|>") in prefixes)
    assert "".join(trained_texts) == "".join(expected[-1:] if last else expected)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ECHO = "<|im_start|>user\nSum up: {{ messages[-1].content }}<|im_end|>\n"


def test_a_template_that_repeats_the_answer_is_refused_as_a_user_would_be_trained() -> None:
    tokenizer = tokenizer_for(
        "echo", CHATML + "{% if messages[-1].role == 'assistant' %}" + ECHO + "{% endif %}" + PROMPT
    )
    with pytest.raises(UserError, match=r"writes '<\|im_end\|>.*Sum up: \{say\}<.*which holds text of the"):
        SpanFinder(tokenizer)


@pytest.mark.parametrize("condition", ["messages | length > 2", "messages[-1].content | length > 8"])
def test_a_row_in_which_the_template_repeats_the_answer_is_refused(condition: str) -> None:
    echo = "{% if messages[-1].role == 'assistant' and " + condition + " %}" + ECHO + "{% endif %}"
    spans = SpanFinder(tokenizer_for("echo", CHATML + echo + PROMPT))
    with pytest.raises(RowError, match="text after the end of an answer"):
        spans.rows([user("Ask?"), answer("Hello"), user("So?"), answer("A longer one.")], None, "last")
    (row,) = spans.rows([user("Ask?"), answer("Hello")], None, "assistant")
    assert [row.text[slice(*span)] for span in row.spans] == ["Hello<|im_end|>"]


def test_end_tokens_that_an_answer_holds_itself_are_its_own() -> None:
    (row,) = SpanFinder(tokenizer_for("chatml", CHATML + PROMPT)).rows(
        [user("Ask?"), answer("one<|im_end|>two")], None, "assistant"
    )
    assert [row.text[slice(*span)] for span in row.spans] == ["one<|im_end|>two<|im_end|>"]


@pytest.mark.parametrize("error", ["{{ 1 / 0 }}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"])
def test_any_exception_of_a_template_is_a_row_error(error: str) -> None:
    """ZeroDivisionError, RecursionError: a template is a program."""
    template = CHATML + PROMPT + "{% if messages[0].content == 'Fail' %}" + error + "{% endif %}"
    spans = SpanFinder(tokenizer_for("chatml", template))
    assert len(spans.rows([user("Ask?"), answer("Hello")], None, "assistant")) == 1
    with pytest.raises(RowError, match=r"refused by the template: (ZeroDivision|Recursion)Error"):
        spans.rows([user("Fail"), answer("Hello")], None, "assistant")


def test_an_error_shows_probe_texts_without_sentinels() -> None:
    template = CHATML.replace("m.role", "m.role ~ loop.revindex")
    with pytest.raises(UserError, match=r"continues with '5.n\{ask\}") as error:
        SpanFinder(tokenizer_for("counting down", template + PROMPT))
    assert "\ue000" not in str(error.value)
    assert "\\ue000" not in str(error.value)
    assert ".." not in str(error.value)
