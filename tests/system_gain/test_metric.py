"""System gain against a plain loop in float64, its intervals and tests against theory, its choice of messages."""

import itertools
import json
import math
import random
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_words import WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from train.data.chat.system_role import SystemRole, apply_system_role
from train.data.chat.template import use_template
from train.data.loss_mask import EncodedRow, encode
from train.data.sources.formats import Conversation
from train.data.tokens.workers import RowTokenizer
from train.errors import UserError
from train.recipe import Source
from train.resampling import estimate_means
from train.system_gain.log_likelihood import compute_log_likelihoods, compute_span_log_likelihoods, make_batches
from train.system_gain.metric import SystemGain, measure_row, render_table, system_gain
from train.system_gain.variants import (
    LabelledConversation,
    VariantRows,
    make_variants,
    read_labelled_conversations,
    read_labels,
    split_system_message,
)

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "recipes" / "smollm2-135m" / "data" / "held_out.jsonl"
WORD_LIST = WORDS.split()


def rows_of_words(count: int, *, instructions: int, turns: int = 1) -> list[dict[str, Any]]:
    """Return rows of very different lengths, several per instruction."""
    rng = random.Random(5)
    text = lambda words: " ".join(rng.choices(WORD_LIST, k=words))  # noqa: E731
    questions = [[text(rng.randint(1, 15)) for _ in range(turns)] for _ in range(instructions)]
    rows = []
    for row in range(count):
        messages = [{"role": "system", "content": f"{row} {text(rng.randint(1, 20))}"}]
        for question in questions[row % instructions]:
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": text(rng.choice([1, 5, 30]))},
            ]
        rows.append({"messages": messages, "rule": "odd" if row % 2 else "even"})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def variants(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = "chatml",
    role: SystemRole = "native",
    **options: Any,
) -> VariantRows:
    use_template(tokenizer, template)
    apply_system_role(tokenizer, role)
    return make_variants(
        read_labelled_conversations([Source(path=str(path))]), RowTokenizer(tokenizer, "assistant"), **options
    )


def plain_sum(model: torch.nn.Module, pieces: list[EncodedRow]) -> float:
    """Return the sum of ln p of the trained tokens, one row at a time, in plain Python."""
    terms = []
    for piece in pieces:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([piece.input_ids])).logits[0]
        for before, (token, label) in enumerate(pairwise(piece.labels)):
            del token
            if label != -100:
                scores = logits[before].tolist()
                largest = max(scores)
                terms.append(scores[label] - largest - math.log(sum(math.exp(score - largest) for score in scores)))
    return math.fsum(terms)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def tiny_tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_each_answer_of_a_conversation_is_scored_by_itself(
    tiny: torch.nn.Module, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """One forward pass gives what a pass over the conversation up to the end of each answer gives."""
    use_template(tiny_tokenizer, "chatml")
    conversations = [row["messages"] for row in rows_of_words(5, instructions=5, turns=3)]
    pieces = [encode(tiny_tokenizer, messages)[0] for messages in conversations]
    assert [len(piece.trained) for piece in pieces] == [3] * 5
    sums = {
        row: spans
        for batch in compute_span_log_likelihoods(tiny, pieces, tokens_per_batch=600)
        for row, spans in batch.items()
    }
    for number, piece in enumerate(pieces):
        alone = [
            plain_sum(tiny, [EncodedRow(piece.ids[:end], np.array([[start, end]]))]) for start, end in piece.trained
        ]
        assert sums[number] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("turns", [1, 3])
def test_figures_are_those_of_a_plain_loop_in_float64(
    turns: int, tiny: torch.nn.Module, tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = rows_of_words(9, instructions=4, turns=turns)
    variant_rows = variants(write(tmp_path / "rows.jsonl", rows), tiny_tokenizer)
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    measured = system_gain(tiny, variant_rows.rows, tokens_per_batch=600)
    gains, over_none, accuracies = [], [], []
    for row, source in zip(variant_rows.rows, rows, strict=True):
        system, rest = source["messages"][0], source["messages"][1:]
        texts = [message["content"] for other in rows for message in other["messages"][:1]]
        conversations = [[system, *rest]]
        for other in row.others:  # found again in the text, not taken from the code
            (text,) = [
                text for text in texts if tiny_tokenizer.decode(other[0].ids).find(f"system\n{text}<|im_end|>") >= 0
            ]
            conversations.append([{"role": "system", "content": text}, *rest])
        own, *others, none = (
            plain_sum(exact, encode(tiny_tokenizer, conversation)) for conversation in [*conversations, rest]
        )
        answers = [message["content"] for message in rest if message["role"] == "assistant"]
        tokens = sum(len(tiny_tokenizer(f"{answer}<|im_end|>")["input_ids"]) for answer in answers)
        assert row.tokens == tokens
        gains.append(statistics.fmean((own - other) / tokens for other in others))
        accuracies.append(statistics.fmean(own > other for other in others))
        over_none.append((own - none) / tokens)
    assert measured.values[:, 0] == pytest.approx(gains, abs=1e-5)
    assert measured.values[:, 1].tolist() == accuracies
    assert measured.values[:, 2] == pytest.approx(over_none, abs=1e-5)
    assert measured.overall.gain.mean == pytest.approx(statistics.fmean(gains), abs=1e-5)
    assert max(map(abs, gains)) > 0.01  # there is something to be wrong about
    odd = measured.groups["rule", "odd"]
    assert odd.rows == 4
    assert odd.gain.mean == pytest.approx(statistics.fmean(gains[1::2]), abs=1e-5)


def test_smollm2_is_scored_as_in_float64(smollm2: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    variant_rows = variants(HELD_OUT, tokenizer, limit=2, others=1)
    pieces = [piece for row in variant_rows.rows for variant in row.all for piece in variant]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    scores = compute_log_likelihoods(model, pieces)
    exact = model.double()
    for piece, value in zip(pieces, scores, strict=True):
        trained = sum(label != -100 for label in piece.labels)
        assert value / trained == pytest.approx(plain_sum(exact, [piece]) / trained, abs=1e-4)


def test_batches_and_padding_do_not_matter(
    tiny: torch.nn.Module, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    variant_rows = variants(write(tmp_path / "rows.jsonl", rows_of_words(12, instructions=5)), tiny_tokenizer)
    pieces = [piece for row in variant_rows.rows for variant in row.all for piece in variant]
    seen: list[int] = []
    separate = compute_log_likelihoods(tiny, pieces, tokens_per_batch=1, on_progress=seen.append)
    assert seen == [1] * len(pieces)
    for tokens in (300, 2_000, 100_000):
        together = compute_log_likelihoods(tiny, pieces, tokens_per_batch=tokens)
        assert together == pytest.approx(separate, rel=1e-6, abs=1e-4)
    order = random.Random(0).sample(range(len(pieces)), len(pieces))
    assert compute_log_likelihoods(tiny, [pieces[row] for row in order]) == pytest.approx(
        separate[order], rel=1e-6, abs=1e-4
    )


def test_batches_hold_each_row_once_within_their_bounds() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(5, 400) for _ in range(200)]
    trained = [rng.randint(1, length) for length in lengths]
    batches = make_batches(lengths, trained, 1_000, 300)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 1_000
        assert len(batch) == 1 or sum(trained[row] for row in batch) <= 300
    assert max(map(len, batches)) > 3


def test_logits_are_made_for_trained_tokens_alone_and_no_hook_or_mode_is_left(
    tiny: torch.nn.Module, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    variant_rows = variants(write(tmp_path / "rows.jsonl", rows_of_words(6, instructions=3)), tiny_tokenizer)
    pieces = [row.own[0] for row in variant_rows.rows]
    sizes: list[int] = []
    hook = tiny.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    tiny.train()
    tiny.model.layers[0].eval()
    modes = [module.training for module in tiny.modules()]
    compute_log_likelihoods(tiny, pieces)
    hook.remove()
    assert sizes == [sum(label != -100 for piece in pieces for label in piece.labels) * tiny.config.vocab_size]
    assert [module.training for module in tiny.modules()] == modes
    assert not tiny.lm_head._forward_pre_hooks
    tiny.eval()


def test_an_output_layer_that_is_no_module_gives_the_same_scores(
    tiny: torch.nn.Module, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant_rows = variants(write(tmp_path / "rows.jsonl", rows_of_words(6, instructions=3)), tiny_tokenizer)
    pieces = [row.own[0] for row in variant_rows.rows]
    expected = compute_log_likelihoods(tiny, pieces)
    monkeypatch.setattr(tiny, "get_output_embeddings", lambda: None)
    assert compute_log_likelihoods(tiny, pieces) == pytest.approx(expected, rel=1e-6)


def test_operations_after_the_output_layer_count(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Gemma 2 caps its logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.0, initializer_range=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    variant_rows = variants(write(tmp_path / "rows.jsonl", rows_of_words(3, instructions=3)), tiny_tokenizer)
    scores = compute_log_likelihoods(model, [row.own[0] for row in variant_rows.rows])
    exact = model.double()
    assert scores == pytest.approx([plain_sum(exact, row.own) for row in variant_rows.rows], rel=1e-5)


def test_an_adapter_is_scored_as_its_merged_model(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5)
    adapted = get_peft_model(base, config)
    variant_rows = variants(write(tmp_path / "rows.jsonl", rows_of_words(6, instructions=3)), tiny_tokenizer)
    adapted.train()
    gain = system_gain(adapted, variant_rows.rows)
    merged = system_gain(adapted.merge_and_unload().eval(), variant_rows.rows)
    plain = system_gain(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), variant_rows.rows)
    assert gain.values == pytest.approx(merged.values, abs=1e-5)
    assert np.abs(gain.values - plain.values).max() > 1e-3


def test_the_measures_of_a_row_by_hand() -> None:
    assert measure_row(-6.0, [-8.0, -5.0, -6.0, -6.0 - 1e-9], -7.0, 4) == pytest.approx(
        ((2 - 1 + 0 + 1e-9) / 4 / 4, (1 + 0 + 0.5 + 1) / 4, 1 / 4, 1), rel=1e-12
    )


def labelled(*rows: tuple[str | None, str, str]) -> list[LabelledConversation]:
    """Return conversations of system message, question and answer."""
    return [
        LabelledConversation(
            Conversation(
                [
                    *([{"role": "system", "content": system}] if system is not None else []),
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ],
                None,
                f":{number}",
            )
        )
        for number, (system, question, answer) in enumerate(rows, 1)
    ]


def messages_of(row: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the system messages that a row is scored under, own first, decoded from the tokens."""
    texts = [tokenizer.decode(pieces[0].ids) for pieces in row.all]
    assert "system" not in texts[-1].split("\n")[0]
    return [text.partition("system\n")[2].partition("<|im_end|>")[0] for text in texts[:-1]]


def test_others_are_siblings_where_there_are_any(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    use_template(tiny_tokenizer, "chatml")
    rows = labelled(
        ("a", "river?", "stone"), ("b", "river?", "cloud"), ("c", "river?", "amber"), (" a ", "river?", "seven"),
        ("d", "north?", "stone"), ("a", "candle?", "stone"), ("a", "candle?", "maple"),
    )  # fmt: skip
    variant_rows = make_variants(rows, RowTokenizer(tiny_tokenizer, "assistant"), others=2)
    messages = [messages_of(row, tiny_tokenizer) for row in variant_rows.rows]
    assert [row.siblings for row in variant_rows.rows] == [True] * 4 + [False] * 3
    assert [row.instruction for row in variant_rows.rows] == [0, 0, 0, 0, 1, 2, 2]
    for own, *others in messages:
        assert len(others) == 2
        assert own.strip() not in others
        assert len(set(others)) == 2
    assert [set(others) for _, *others in messages[:4]] == [{"b", "c"}, {"a", "c"}, {"a", "b"}, {"b", "c"}]
    assert set(messages[4][1:]) < {"a", "b", "c"}
    assert messages[3][0] == " a "  # its own stays as it is, to the blank
    single = make_variants(rows, RowTokenizer(tiny_tokenizer, "assistant"), others=1)
    assert [len(row.others) for row in single.rows] == [1] * 7


def test_siblings_are_those_with_the_same_turns_and_tools(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    def conversation(
        system: str, second: str, answer: str, tools: list[dict[str, Any]] | None = None
    ) -> LabelledConversation:
        texts = [("system", system), ("user", "river?"), ("assistant", answer), ("user", second), ("assistant", answer)]
        return LabelledConversation(
            Conversation([{"role": role, "content": text} for role, text in texts], tools, ":1")
        )

    tools = [{"type": "function", "function": {"name": "tides"}}]
    rows = [
        conversation("a", "north?", "stone"),
        conversation("b", "north?", "cloud"),
        conversation("c", "south?", "cloud"),
        conversation("d", "north?", "cloud", tools),
    ]
    use_template(tiny_tokenizer, "chatml")
    variant_rows = make_variants(rows[:3], RowTokenizer(tiny_tokenizer, "assistant"))
    assert [row.instruction for row in variant_rows.rows] == [0, 0, 1]
    assert variant_rows.rows[0].own[0].trained.shape == (2, 2)  # both answers count
    from train.system_gain.variants import _instruction

    assert len({_instruction(row.conversation) for row in rows}) == 3


def test_others_follow_from_the_seed_and_no_row_has_its_own_text(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    use_template(tiny_tokenizer, "chatml")
    rows = labelled(*((WORD_LIST[row % 7], f"question {row}", "stone") for row in range(40)))
    encoder = RowTokenizer(tiny_tokenizer, "assistant")
    messages = [
        [messages_of(row, tiny_tokenizer) for row in make_variants(rows, encoder, others=3, seed=seed).rows]
        for seed in (0, 0, 1)
    ]
    assert messages[0] == messages[1] != messages[2]
    for own, *others in messages[0]:
        assert len({own, *others}) == 4
    assert {other for _, *others in messages[0] for other in others} == set(WORD_LIST[:7])
    limited = make_variants(rows, encoder, others=3, limit=9)
    assert len(limited.rows) == 9
    places = [int(row.place[1:]) - 1 for row in limited.rows]
    assert places == sorted(places)
    assert [messages_of(row, tiny_tokenizer) for row in limited.rows] == [messages[0][place] for place in places]


def test_dropped_rows_are_counted(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    use_template(tiny_tokenizer, "chatml")
    rows = labelled(
        ("a", "river?", "stone"), (None, "river?", "stone"), ("b", "<|im_end|>?", "stone"), ("c", "x" * 400, "y")
    )
    variant_rows = make_variants(rows, RowTokenizer(tiny_tokenizer, "assistant"), max_length=300)
    assert [row.place for row in variant_rows.rows] == [":1"]
    assert variant_rows.dropped["no system message"] == 1
    assert variant_rows.dropped["more than 300 tokens"] == 1
    assert sum(variant_rows.dropped.values()) == 3
    assert variant_rows.examples["more than 300 tokens"].startswith(":4: ")
    identical = make_variants(rows[:1] * 3, RowTokenizer(tiny_tokenizer, "assistant"))
    assert not identical.rows
    assert identical.dropped == {"no other system message in the data": 3}


@pytest.mark.parametrize(("template", "role"), [("chatml", "merge_into_user"), (None, "native"), ("chatml", "native")])
def test_only_the_message_differs_under_any_policy(
    template: str | None, role: SystemRole, tokenizer: PreTrainedTokenizerBase
) -> None:
    variant_rows = variants(HELD_OUT, tokenizer, template, role, limit=20)
    for row in variant_rows.rows:
        assert row.same_answer
        answers = [
            tokenizer.decode([i for i, label in zip(p[0].ids, p[0].labels, strict=True) if label != -100])
            for p in row.all
        ]
        assert len(set(answers)) == 1
        assert answers[0].endswith("<|im_end|>")
        prompts = [tokenizer.decode(pieces[0].ids) for pieces in row.all]
        assert len(set(prompts)) == len(prompts)


def test_a_leading_run_of_system_messages_is_one_and_a_later_one_stays() -> None:
    turns = [("system", "a"), ("system", "b "), ("user", "x"), ("system", "c"), ("assistant", "y")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert split_system_message(messages) == ("a\n\nb", messages[2:])


def test_an_answer_that_a_border_changes_is_compared_by_sums(tiny: torch.nn.Module) -> None:
    from train.system_gain.variants import Variants

    def encoded(ids: list[int], start: int) -> list[EncodedRow]:
        return [EncodedRow(np.array(ids, np.int32), np.array([[start, len(ids)]], np.int32))]

    row = Variants(
        Conversation([], None, ":1"),
        0,
        (),
        encoded([5, 6, 7, 8], 2),
        [encoded([9, 6, 7, 8, 9], 2)],
        encoded([6, 7, 8], 1),
        False,
    )
    assert not row.same_answer
    assert row.tokens == 2
    measured = system_gain(tiny, [row])
    exact = tiny.double()
    own, other = plain_sum(exact, row.own), plain_sum(exact, row.others[0])
    tiny.float()
    assert measured.values[0, 0] == pytest.approx((own - other) / 2, abs=1e-5)
    assert measured.other_tokens == 1
    assert measured.overall.gain.low is None  # one instruction tells nothing of how sure it is


def test_labels_are_read_from_the_columns() -> None:
    preferences = [
        {"dimension": "style", "subdimension": "tone", "preference": "x", "description": "y"},
        {"dimension": 3},
    ]
    row = {"rule": "lower_case", "main_source": "", "source": 7, "preference_set": preferences, "other": "yes"}
    assert read_labels(row) == (("rule", "lower_case"), ("style", "tone"))
    assert read_labels({"preference_set": json.dumps(preferences)}) == (("style", "tone"),)
    assert read_labels({"preference_set": "{"}, ("other",)) == ()
    assert read_labels(row, ("other",)) == (("other", "yes"), ("style", "tone"))


def test_intervals_are_those_of_normal_theory_over_instructions() -> None:
    """With many instructions of equal size, whose rows are correlated; an interval over rows would be too narrow."""
    rng = np.random.default_rng(3)
    values = (rng.normal(0.3, 1, 500)[:, None] + rng.normal(0, 0.2, (500, 4))).reshape(-1, 1)
    instructions = np.repeat(np.arange(500), 4)
    (estimate,) = estimate_means(values, instructions, np.zeros(1), resamples=8_000)
    means = values.reshape(500, 4).mean(1)
    error = statistics.stdev(means.tolist()) / math.sqrt(500)
    assert estimate.mean == pytest.approx(means.mean())
    assert estimate.low == pytest.approx(means.mean() - 1.96 * error, abs=0.1 * error)
    assert estimate.high == pytest.approx(means.mean() + 1.96 * error, abs=0.1 * error)
    (of_rows,) = estimate_means(values, np.arange(2_000), np.zeros(1))
    assert of_rows.high - of_rows.low < 0.6 * (estimate.high - estimate.low)


def test_rows_weigh_alike_however_many_an_instruction_has() -> None:
    by_instruction = [[1.0, 2.0, 3.0], [10.0], [4.0], [5.0, 5.0], [7.0], [0.0]]
    values = np.array([[value] for of_one in by_instruction for value in of_one])
    numbers = [number for number, of_one in enumerate(by_instruction) for _ in of_one]
    (estimate,) = estimate_means(values, np.array(numbers), np.zeros(1), resamples=20_000)
    assert estimate.mean == pytest.approx(37 / 9)
    means = sorted(  # of every way to draw six of the six again
        statistics.fmean(value for of_one in drawn for value in of_one)
        for drawn in itertools.product(by_instruction, repeat=6)
    )
    assert estimate.low == pytest.approx(means[round(0.025 * len(means))], abs=0.1)
    assert estimate.high == pytest.approx(means[round(0.975 * len(means))], abs=0.1)


def test_the_interval_covers_the_mean_in_95_percent_of_samples() -> None:
    rng = np.random.default_rng(4)
    probe_conversations, held = 400, 0
    for trial in range(probe_conversations):
        sizes = rng.integers(1, 4, 60)
        effect = np.repeat(rng.normal(0.5, 1, 60), sizes) + rng.normal(0, 0.5, sizes.sum())
        (estimate,) = estimate_means(
            effect[:, None], np.repeat(np.arange(60), sizes), np.zeros(1), seed=trial, resamples=500, permutations=1
        )
        held += estimate.low <= 0.5 <= estimate.high
    assert 0.95 * probe_conversations - held < 3.5 * math.sqrt(probe_conversations * 0.95 * 0.05)  # a binomial's spread
    assert held < probe_conversations


def test_p_is_uniform_without_an_effect_and_small_with_one() -> None:
    rng = np.random.default_rng(5)
    p_values = []
    for trial in range(400):
        values = np.repeat(rng.normal(0, 1, 30), 2)[:, None]
        options = {"seed": trial, "resamples": 1, "permutations": 499}
        p_values.append(estimate_means(values, np.repeat(np.arange(30), 2), np.zeros(1), **options)[0].p)
    ordered = np.sort(p_values)
    # Kolmogorov's distance of 400 uniform numbers is below 1.63 / 20 in 99 of 100; steps of 1 / 500 beside it
    assert np.abs(ordered - (np.arange(400) + 0.5) / 400).max() < 1.63 / 20 + 1 / 500
    effect = rng.normal(1, 1, (40, 1))
    assert estimate_means(effect, np.arange(40), np.zeros(1))[0].p < 0.001
    assert estimate_means(effect, np.arange(40), np.ones(1))[0].p > 0.05


def test_p_is_that_of_all_flips_counted() -> None:
    values = np.array([0.9, 0.4, -0.3, 1.2, 0.1, 0.7])
    signs = [[1 if bits >> place & 1 else -1 for place in range(6)] for bits in range(64)]
    extreme = sum(abs(np.dot(sign, values)) >= abs(values.sum()) - 1e-12 for sign in signs)
    (estimate,) = estimate_means(values[:, None], np.arange(6), np.zeros(1), permutations=20_000)
    assert estimate.p == pytest.approx(extreme / 64, abs=4 * math.sqrt(extreme / 64 / 20_000))


def test_rows_of_an_instruction_flip_together() -> None:
    """Ten rows of one instruction are one piece of evidence, not ten."""
    values = np.full((10, 1), 0.5)
    assert estimate_means(values, np.zeros(10, int), np.zeros(1))[0].p == 1
    assert estimate_means(values, np.arange(10), np.zeros(1))[0].p < 0.01


@pytest.fixture
def measured(tiny: torch.nn.Module, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> SystemGain:
    variant_rows = variants(write(tmp_path / "rows.jsonl", rows_of_words(16, instructions=8)), tiny_tokenizer)
    return system_gain(tiny, variant_rows.rows)


def test_the_table_shows_the_measured_figures(measured: SystemGain) -> None:
    record = json.loads(json.dumps(measured.record()))
    mean = pytest.approx(measured.values[:, 0].mean(), rel=1e-12)
    assert record["overall"]["gain"]["mean"] == mean
    assert [(group["of"], group["is"], group["rows"]) for group in record["groups"]] == [
        ("rule", "even", 8),
        ("rule", "odd", 8),
    ]
    assert measured.metrics()["eval_system_gain"] == mean
    assert measured.metrics()["eval_system_accuracy_over_none"] == measured.values[:, 3].mean()
    table = render_table({"tiny": measured})
    gain = measured.overall.gain
    assert f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" in table
    odd = measured.groups["rule", "odd"].gain
    assert f"| rule | odd | 8 | {odd.mean:+.3f} (n = 4) p={odd.p:.3f} |" in table  # eight rows of four instructions
    assert "(n = ...): too few instructions for an interval, which needs at least 6." in table
    widths = [line.count("|") for line in table.splitlines() if line.startswith("|")]
    assert set(widths) == {3, 5}
    assert "16 rows of 8 instructions; " in table
    single = replace(measured, overall=replace(measured.overall, rows=1, instructions=1))
    assert "1 row of 1 instruction; " in render_table({"tiny": single})


def test_a_model_has_no_change_from_itself(measured: SystemGain) -> None:
    change = measured.change_from(measured)
    assert change[None].gain.mean == change["rule", "odd"].gain.mean == 0
    assert change[None].gain.low is change[None].gain.high is None  # nothing says how far others would change
    assert change[None].accuracy.p == 1
    low, high = change[None].accuracy.low, change[None].accuracy.high
    assert (
        low == -high == pytest.approx(-(1.96**2) / (8 + 1.96**2), abs=1e-4)
    )  # eight instructions, none of which changed
    table = render_table({"before": measured, "after": measured}, change)
    assert "| +0.000 (all alike) p=1.000 |" in table
    assert "(all alike): all values are equal" in table


def test_no_rows_and_weights_that_are_not_finite_are_errors(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with pytest.raises(UserError, match=r"^system gain: no row has a system message"):
        system_gain(model, [])
    variant_rows = variants(write(tmp_path / "rows.jsonl", rows_of_words(4, instructions=2)), tiny_tokenizer)
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: the model gives its answer no finite likelihood \(4 of 4 rows\)"
    ):
        system_gain(model, variant_rows.rows)
