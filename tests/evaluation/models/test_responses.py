"""Answers of a local model, of a server, and of a vLLM server: correct, and never requested twice."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killed_batches import KILLED_AFTER_BATCHES
from scripted_server import Asked, Reply, error, said, served
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.errors import UserError
from train.evaluation.models.options import LocalModel, ServedModel
from train.evaluation.models.responses import generate_answers, open_model
from train.llm.failures import RequestFailed
from train.llm.request import Decoding
from train.llm.server import Server
from train.llm.system_role import merge_into_user

ROOT = Path(__file__).parents[3]
GREEDY = Decoding(6, temperature=0.0)


def ask(text: str, system: str = "Speak like a river.") -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


CONVERSATIONS = [ask("stone"), ask("a river and a stone and a paper window " * 3), ask("window"), [ask("x")[1]]]


def one_by_one(folder: Path, conversations: list, tokens: int) -> list[tuple[str, int]]:
    """Greedy answers and their token counts, without generate, cache or padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stops = model.generation_config.eos_token_id
    answers = []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        written: list[int] = []
        while len(written) < tokens and (not written or written[-1] != stops):
            with torch.no_grad():
                written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        answers.append((tokenizer.decode(written, skip_special_tokens=True), len(written)))
    return answers


def rows(journal: Path) -> list[tuple]:
    with sqlite3.connect(journal) as connection:
        return sorted(connection.execute("SELECT key, text, finish_reason, asked_at FROM answers").fetchall())


def test_a_local_model_answers_greedily_and_only_once(tiny_chat_model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "a.sqlite"
    answers = generate_answers(LocalModel(str(tiny_chat_model), batch_size=3), CONVERSATIONS, GREEDY, journal)
    expected = one_by_one(tiny_chat_model, CONVERSATIONS, 6)
    assert [(answer.text, answer.completion_tokens) for [answer] in answers] == expected
    assert [answer.cut for [answer] in answers] == [tokens == 6 for _, tokens in expected]
    before = rows(journal)
    again = generate_answers(LocalModel(str(tiny_chat_model), batch_size=1), CONVERSATIONS, GREEDY, journal)
    assert [answer.text for [answer] in again] == [answer.text for [answer] in answers]
    assert all(answer.from_journal for [answer] in again)
    assert rows(journal) == before


def test_an_open_model_answers_several_calls(tiny_chat_model: Path, tmp_path: Path) -> None:
    """The weights stay; the answers and their names in the journal are those of separate calls."""
    expected = [text for text, _ in one_by_one(tiny_chat_model, CONVERSATIONS, 6)]
    with open_model(LocalModel(str(tiny_chat_model), batch_size=2)) as model:
        [[first]] = generate_answers(model, CONVERSATIONS[:1], GREEDY, tmp_path / "a.sqlite")
        weights = model.weights
        answers = generate_answers(model, CONVERSATIONS, GREEDY, tmp_path / "a.sqlite")
        assert model.weights is weights
    assert [answer.text for [answer] in answers] == expected
    assert first.text == expected[0]
    again = generate_answers(LocalModel(str(tiny_chat_model)), CONVERSATIONS, GREEDY, tmp_path / "a.sqlite")
    assert all(answer.from_journal for [answer] in again)


def test_another_spelling_of_the_folder_is_the_same_model(tiny_chat_model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "answers.sqlite"
    for model in (tiny_chat_model, f"{tiny_chat_model}/", f"{tiny_chat_model.parent}/./{tiny_chat_model.name}"):
        generate_answers(LocalModel(str(model)), CONVERSATIONS, GREEDY, journal)
    assert len(rows(journal)) == len(CONVERSATIONS)


def test_samples_differ_and_are_reproducible(tiny_chat_model: Path, tmp_path: Path) -> None:
    drawn = Decoding(8, temperature=1.0, top_p=0.9, extra={"repetition_penalty": 1.03})
    checkpoint = LocalModel(str(tiny_chat_model))
    runs = [generate_answers(checkpoint, CONVERSATIONS, drawn, tmp_path / f"{run}.sqlite", samples=3) for run in "ab"]
    texts = [[[answer.text for answer in of_row] for of_row in run] for run in runs]
    assert texts[0] == texts[1]
    assert all(len(set(of_row)) == 3 for of_row in texts[0])
    other = generate_answers(checkpoint, CONVERSATIONS, replace(drawn, seed=7), tmp_path / "c.sqlite", samples=3)
    assert texts[0] != [[answer.text for answer in of_row] for of_row in other]


def test_a_model_trained_again_in_the_same_folder_is_asked_again(tiny_chat_model: Path, tmp_path: Path) -> None:
    folder, journal = tmp_path / "model", tmp_path / "a.sqlite"
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_chat_model).save_pretrained(folder)
    first = generate_answers(LocalModel(str(folder)), CONVERSATIONS, GREEDY, journal)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights), alpha=0.1)
    model.save_pretrained(folder)
    (folder / "ifeval.json").write_text("{}", encoding="utf-8")
    second = generate_answers(LocalModel(str(folder)), CONVERSATIONS, GREEDY, journal)
    assert [answer.text for [answer] in second] == [text for text, _ in one_by_one(folder, CONVERSATIONS, 6)]
    assert [answer.text for [answer] in second] != [answer.text for [answer] in first]
    (folder / "ifeval.json").unlink()  # results beside the model make it no other model
    assert all(
        answer.from_journal for [answer] in generate_answers(LocalModel(str(folder)), CONVERSATIONS, GREEDY, journal)
    )


def test_prompts_near_the_context_length(tiny_chat_model: Path, tmp_path: Path) -> None:
    positions = AutoModelForCausalLM.from_pretrained(tiny_chat_model).config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)

    def length(words: int) -> int:
        messages = [{"role": "user", "content": "river " * words}]
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    fits = max(words for words in range(1, positions) if length(words) < positions)
    conversations = [[{"role": "user", "content": "river " * words}] for words in (fits + 1, fits, 1)]
    [too_long], [last], [short] = generate_answers(
        LocalModel(str(tiny_chat_model)), conversations, GREEDY, tmp_path / "a.sqlite"
    )
    assert isinstance(too_long, RequestFailed)
    assert f"{length(fits + 1):,} tokens" in str(too_long)
    assert last.completion_tokens <= positions - length(fits) < 6
    assert (short.text, short.completion_tokens) == one_by_one(tiny_chat_model, conversations[2:], 6)[0]


def test_an_answer_ends_before_its_stop_sequence(tiny_chat_model: Path, tmp_path: Path) -> None:
    [[whole]] = generate_answers(
        LocalModel(str(tiny_chat_model)), CONVERSATIONS[:1], Decoding(30, temperature=0.0), tmp_path / "a.sqlite"
    )
    stop = whole.text.strip()[3:5]
    stopping = Decoding(30, temperature=0.0, stop=(stop,))
    [[answer]] = generate_answers(LocalModel(str(tiny_chat_model)), CONVERSATIONS[:1], stopping, tmp_path / "a.sqlite")
    assert answer.text == whole.text[: whole.text.find(stop)]
    assert not answer.cut


def test_templates_are_handled_as_in_training(tiny_chat_model: Path, tmp_path: Path) -> None:
    """A template that loses the system message is refused, and merged under the policy of a recipe."""
    deaf = tmp_path / "deaf.jinja"
    deaf.write_text(
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="loses system messages"):
        generate_answers(
            LocalModel(str(tiny_chat_model), template=str(deaf)), CONVERSATIONS, GREEDY, tmp_path / "a.sqlite"
        )
    [[answer]] = generate_answers(
        LocalModel(str(tiny_chat_model), template=str(deaf), system_role="merge_into_user"),
        CONVERSATIONS[:1], GREEDY, tmp_path / "a.sqlite",
    )  # fmt: skip
    [[same]] = generate_answers(
        LocalModel(str(tiny_chat_model), template=str(deaf), system_role="merge_into_user"),
        [merge_into_user(CONVERSATIONS[0])], GREEDY, tmp_path / "b.sqlite",
    )  # fmt: skip
    assert answer.text == same.text


def test_unsupported_request_fields_of_a_local_model_are_an_error(tiny_chat_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="presence_penalty is not supported"):
        generate_answers(
            LocalModel(str(tiny_chat_model)),
            CONVERSATIONS,
            Decoding(4, extra={"presence_penalty": 1}),
            tmp_path / "a.sqlite",
        )
    with pytest.raises(UserError, match=r"--model .*nowhere"):
        generate_answers(LocalModel(str(tmp_path / "nowhere")), CONVERSATIONS, GREEDY, tmp_path / "a.sqlite")


def test_a_merged_system_message_precedes_the_first_user_turn() -> None:
    later = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert merge_into_user([*ask("a", "S"), *later]) == [{"role": "user", "content": "S\n\na"}, *later]
    assert merge_into_user([*ask("a", "  "), *later]) == [{"role": "user", "content": "a"}, *later]


KILLED = f"""
{KILLED_AFTER_BATCHES}"""
KILLED += """
from pathlib import Path
from train.evaluation.models.options import LocalModel
from train.evaluation.models.responses import generate_answers
from train.llm.request import Decoding
conversations = [[{"role": "user", "content": f"stone {number}"}] for number in range(10)]
model = LocalModel(sys.argv[1], batch_size=2)
answers = generate_answers(model, conversations, Decoding(4, temperature=0.0), Path(sys.argv[2]))
print([answer.text for [answer] in answers])
"""


def test_a_killed_run_keeps_every_batch(tiny_chat_model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "a.sqlite"

    def run(batches: int) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(batches), tiny_chat_model, journal],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert run(2).returncode == -signal.SIGKILL
    assert len(rows(journal)) == 4
    before = rows(journal)
    done = run(3)
    assert done.returncode == 0, done.stderr
    assert set(before) < set(rows(journal))
    conversations = [[{"role": "user", "content": f"stone {number}"}] for number in range(10)]
    assert done.stdout.splitlines()[-1] == str([text for text, _ in one_by_one(tiny_chat_model, conversations, 4)])


async def parrot(asked: Asked) -> Reply:
    """Answer with the messages and their roles; refuse prompts about windows."""
    if "window" in asked.prompt:
        return error(400, "the prompt is too long")
    return said(" ".join(f"{turn['role']}:{turn['content']}" for turn in asked.body["messages"]))


def test_a_server_answers_with_its_own_template_or_merged(tmp_path: Path) -> None:
    with served(parrot) as server:
        there = ServedModel("m", (Server(server.url, concurrency=2),))
        conversations = [ask("stone"), ask("window"), [ask("x")[1]]]
        first = generate_answers(there, conversations, GREEDY, tmp_path / "a.sqlite", samples=2)
        assert [[answer.text for answer in of_row] for of_row in (first[0], first[2])] == [
            ["system:Speak like a river. user:stone"] * 2, ["user:x"] * 2,
        ]  # fmt: skip
        assert all(isinstance(answer, RequestFailed) for answer in first[1])
        into_user = replace(there, system_role="merge_into_user")
        [[answer]] = generate_answers(into_user, conversations[:1], GREEDY, tmp_path / "a.sqlite")
        assert answer.text == "user:Speak like a river.\n\nstone"
        requests = len(server.asked)
        generate_answers(there, conversations[:1], GREEDY, tmp_path / "a.sqlite", samples=2)
        assert len(server.asked) == requests


def test_answers_come_without_reasoning_which_the_journal_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bench, ifeval and rules use `generate_answers`."""
    replies = {
        "stone": "Hm.</think>River.<|im_end|>",
        "window": "<|channel|>analysis<|message|>Hm",
        "river": "River.<|im_end|>\n<|im_start|>user\nAnd?",
    }

    async def script(asked: Asked) -> Reply:
        return said(replies[asked.prompt], "length" if asked.prompt == "river" else "stop")

    with served(script) as server:
        conversations = [ask(prompt) for prompt in replies]
        answers = generate_answers(
            ServedModel("m", (Server(server.url),)), conversations, GREEDY, tmp_path / "a.sqlite"
        )
    assert [(answer.text, answer.only_reasoning, answer.cut) for [answer] in answers] == [
        ("River.", False, False),
        ("", True, False),
        ("River.", False, False),
    ]
    assert sorted(text for _, text, *_ in rows(tmp_path / "a.sqlite")) == sorted(replies.values())
    warnings = [line.partition("; ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: reasoning without an end, and nothing said: 1 answer (answers 1)",
        "warning: control tokens taken off the end: 1 answer (answers 1)",
        "warning: ran on after its end, and was cut there: 1 answer (answers 1)",
    ]


def test_an_empty_answer_of_a_server_counts_the_second_time(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        match asked.prompt:
            case "nothing":
                return said("")
            case "at first":
                return said("something" if asked.times else "")
        return said("Half", "length")

    conversations = [[{"role": "user", "content": prompt}] for prompt in ("nothing", "at first", "cut")]
    with served(script) as server:
        there = ServedModel("m", (Server(server.url),))
        answers = [answer for [answer] in generate_answers(there, conversations, GREEDY, tmp_path / "a.sqlite")]
        assert [(answer.text, answer.cut) for answer in answers] == [("", False), ("something", False), ("Half", True)]
        assert server.prompts() == {"nothing": 2, "at first": 2, "cut": 1}
        generate_answers(there, conversations, GREEDY, tmp_path / "a.sqlite")
        assert server.prompts() == {"nothing": 2, "at first": 2, "cut": 1}


VLLM = """#!{python}
import argparse, json, os, pathlib, sys, threading
sys.path.insert(0, {tests!r})
from scripted_server import ScriptedServer, error, said
import asyncio
pathlib.Path({log!r}).write_text(json.dumps([os.getpid(), *sys.argv[1:]]))
parser = argparse.ArgumentParser()
for name in ("--served-model-name", "--chat-template", "--host", "--port", "--dtype"):
    parser.add_argument(name)
parser.add_argument("words", nargs="*")
options = parser.parse_args()
if options.dtype == "float32":
    sys.exit("no room for the weights")
template = pathlib.Path(options.chat_template).read_text()
tries = 0
async def script(asked):
    global tries
    tries += asked.path == "/health"
    if asked.path == "/health":
        return said("") if tries > 1 else error(503, "loading")
    return said(f"{{asked.body['model'] == options.served_model_name}} {{len(template)}}")
async def main():
    server = ScriptedServer(script)
    server._port = int(options.port)
    async with server:
        await asyncio.Event().wait()
asyncio.run(main())
"""


def test_vllm_is_started_with_the_given_template_and_stopped(
    tiny_chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in takes vllm's options and answers like it; vllm itself needs a GPU."""
    program, log = tmp_path / "vllm", tmp_path / "log.json"
    program.write_text(VLLM.format(python=sys.executable, tests=str(ROOT / "tests"), log=str(log)), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # of no use for what runs on this machine
    checkpoint = LocalModel(str(tiny_chat_model), engine="vllm", system_role="merge_into_user")
    with open_model(checkpoint) as model:
        generate_answers(model, CONVERSATIONS[1:2], GREEDY, tmp_path / "a.sqlite")
        first_process, *_ = json.loads(log.read_text(encoding="utf-8"))
        generate_answers(model, CONVERSATIONS[2:3], GREEDY, tmp_path / "a.sqlite")
        assert json.loads(log.read_text(encoding="utf-8"))[0] == first_process  # not started again
    [[answer]] = generate_answers(checkpoint, CONVERSATIONS[:1], GREEDY, tmp_path / "a.sqlite")
    process, *command = json.loads(log.read_text(encoding="utf-8"))
    assert command[:2] == ["serve", str(tiny_chat_model)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    text, length = answer.text.split()
    assert (text, int(length) > 0) == ("True", True)
    assert int(length) != len(tokenizer.chat_template)  # the policy is in it
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    with pytest.raises(UserError, match=r"(?s)exit code 1.*no room for the weights") as error:
        generate_answers(replace(checkpoint, dtype="float32"), CONVERSATIONS[:1], GREEDY, tmp_path / "a.sqlite")
    assert "\n" in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="vllm is not installed"):
        generate_answers(checkpoint, CONVERSATIONS[:1], GREEDY, tmp_path / "a.sqlite")


NO_SYSTEM_ROLE = """
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ raise_exception('no chat.system_role: here') }}{%- endif -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


@pytest.mark.parametrize("name", ["hierarchy", "turns", "gain"])
def test_errors_of_the_template_name_the_options(
    tiny_chat_model: Path, tmp_path: Path, says_no: Callable[..., str], name: str
) -> None:
    """A command has no recipe, whose keys are those of the errors."""
    model = shutil.copytree(tiny_chat_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(NO_SYSTEM_ROLE, encoding="utf-8")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"system": "Be.", "prompt": "a", "output": "b"}) + "\n", encoding="utf-8")
    arguments = (name, "--model", model, *(("--data", data) if name == "gain" else ()))
    refusal = says_no(*arguments)
    reason = "loses system messages (it raises: no chat.system_role: here)."
    assert f"--system-role native: the template of {model} {reason}" in refusal
    assert refusal.rstrip().endswith("Write `merge_into_user` (into the user turn) or `turn` (a turn of its own).")
    refusal = says_no(*arguments, "--template", "nowhere")
    assert "--template: there is no template 'nowhere'. Write one of chatml" in refusal
    assert refusal.rstrip().endswith("or leave it out to use the tokenizer's own.")
