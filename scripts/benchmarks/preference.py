"""Measure DPO: our packed pairs beside the padded ones of TRL.

    python scripts/benchmark.py preference --json preference.json
    python scripts/benchmark.py preference --repeat 2 --pairs 32

A tiny model with random weights trains an epoch of pairs that have the lengths of Multifaceted Collection; nothing is
downloaded. Contenders run in turns (A B C, A B C, ...), each in a fresh process with empty caches, and must train the
same ids and labels of the same pairs.
"""

import argparse
import json
import random
import statistics
import string
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.process import failure_reason, running, script_command
from benchmarks.record import check_json_file, describe_environment, publish
from benchmarks.rows import lengths
from train.cli import non_negative_int, positive_int
from train.errors import UserError
from train.progress import progress_bar

CONTENDERS = {
    "ours": "janus-sft",
    "trl": "TRL, reference computed once",
    "trl-beside": "TRL, reference computed in each step (its default)",
    "trl-single": "TRL, reference computed once, 1 pair per micro-batch",
}
"""Contenders in the order of the table; `trl` and `trl-beside` have micro-batches of `--batch` pairs."""
_SETTINGS = ("pairs", "pairs_per_step", "batch", "max_length", "repeat", "config", "seed")
_PACKAGES = ("janus-sft", "trl", "transformers", "torch", "accelerate", "datasets")
_WARMUP = 1
_LEARNING_RATE = 5e-7
"""That of recipes/janus-7b/preference/dpo.yaml."""

Figures = dict[str, Any]


def add_to(commands: Any) -> None:
    """Add the command to those of benchmark.py."""
    parser = commands.add_parser("preference", help="DPO: TRL's padded pairs and our packed ones", description=__doc__)
    add = parser.add_argument
    add("--pairs", type=positive_int, default=48, help="pairs of the epoch (default %(default)s)")
    about_step = "pairs of an optimizer step, ours of about as many (default %(default)s)"
    add("--pairs-per-step", type=positive_int, default=8, metavar="N", help=about_step)
    add("--batch", type=positive_int, default=8, metavar="N", help="pairs of TRL's micro-batch (default 8, TRL's own)")
    add("--max-length", type=positive_int, default=2_048, help="tokens of a prompt with its answer (default 2,048)")
    add("--repeat", type=positive_int, default=5, help="runs of each contender; the table has medians (default 5)")
    add("--config", default="tiny", metavar="FILE_OR_NAME", help="a model's config.json (default tiny)")
    add("--json", type=Path, metavar="FILE", help="write every measurement to FILE")
    add("--only", metavar="NAME,...", help=f"some of {','.join(CONTENDERS)} (default all)")
    add("--seed", type=non_negative_int, default=42, help="decides lengths, text, weights and order (default 42)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure the contenders, print the table and write the record. Raises UserError."""
    contenders = options.only.split(",") if options.only else list(CONTENDERS)
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise UserError(f"--only: there is no {', '.join(map(repr, unknown))}. Choose from {', '.join(CONTENDERS)}.")
    if options.pairs_per_step % options.batch:
        raise UserError(f"--batch: {options.pairs_per_step} pairs of a step are no multiple of {options.batch}.")
    if options.pairs < 2 * options.pairs_per_step:
        raise UserError(f"--pairs: the first step is not timed, so write {2 * options.pairs_per_step} or more.")
    check_json_file(options.json)
    environment = describe_environment(_PACKAGES)
    settings = {key: getattr(options, key) for key in _SETTINGS}
    settings |= {"contenders": contenders, "epochs": 1, "learning_rate": _LEARNING_RATE}
    record = compare_trainings(settings)
    publish(format_table(record), environment, {"command": "preference", **record}, options.json)


def compare_trainings(settings: Figures) -> Figures:
    """Write pairs and model, measure the contenders in turns and return the record. Raises UserError."""
    contenders = [name for name in CONTENDERS if name in settings["contenders"]]
    measurements: list[Figures] = []
    with TemporaryDirectory(prefix="janus-benchmark-") as name:
        folder = Path(name)
        settings = settings | write_workload(folder, settings)
        total = settings["repeat"] * len(contenders)
        with progress_bar("measuring", total=total, unit="runs") as measuring:
            for repetition in range(settings["repeat"]):
                for contender in contenders:
                    line = measure(contender, folder / f"{contender}-{repetition}", settings)
                    measurements.append({"contender": contender, "repetition": repetition, **line})
                    measuring.advance()
                    shown = f"{line['step_seconds']:.2f} s/step, {line['tokens_per_second']:,.0f} tokens/s"
                    measuring.show(f"{measuring.done}/{total} {contender}: {shown}")
        if len({json.dumps(line.pop("digests")) for line in measurements}) > 1:
            raise ValueError("the contenders have not trained the same pairs")
    medians = compute_medians(measurements)
    return {"settings": settings, "medians": medians, "ratios": _ratios(medians), "measurements": measurements}


def pair_lengths(settings: Figures) -> Iterator[tuple[int, int, int, int]]:
    """Yield the letters of system message, question, chosen and rejected answer of each pair, one token per letter.

    The prompt is that of a row of rows.py; both answers are drawn from the lengths of its answers, one without regard
    to the other. Prompts that leave no room for an answer are left out, as TRL would drop them.
    """
    from benchmarks.training_inputs import ANSWER_TOKENS, CHARACTERS_PER_TOKEN, PROMPT_TOKENS

    rng = random.Random(settings["seed"])
    pairs = 0
    while pairs < settings["pairs"]:
        row = [round(characters / CHARACTERS_PER_TOKEN) for characters in lengths(rng).values()]
        rejected = round(lengths(rng)["assistant"] / CHARACTERS_PER_TOKEN)
        if sum(row[:2]) + PROMPT_TOKENS + ANSWER_TOKENS <= settings["max_length"]:
            pairs += 1
            yield row[0], row[1], row[2], rejected


def write_workload(folder: Path, settings: Figures) -> Figures:
    """Write pairs of random letters and a model of random weights with its tokenizer.

    Returns the paths, the model's config, and the sequences of a step of ours, whose epoch has as many steps as TRL's.
    """
    from benchmarks.training_inputs import ANSWER_TOKENS, PROMPT_TOKENS, load_model_config, write_model
    from train.data.packing import pack

    rng, pair_tokens, longest = random.Random(settings["seed"]), [], settings["max_length"]
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as rows:
        for system, user, *answers in pair_lengths(settings):
            texts = ["".join(rng.choices(string.ascii_letters, k=letters)) for letters in (system, user, *answers)]
            roles = ("system", "user", "assistant", "assistant")
            messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
            row = {"prompt": messages[:2], "chosen": messages[2:3], "rejected": messages[3:]}
            rows.write(json.dumps(row) + "\n")
            prompt = system + user + PROMPT_TOKENS
            pair_tokens.append(sum(min(prompt + answer + ANSWER_TOKENS, longest) for answer in answers))
    config = load_model_config(settings["config"])
    write_model(folder / "model", config, settings["seed"])
    steps = -(-settings["pairs"] // settings["pairs_per_step"])
    return {
        "model": str(folder / "model"),
        "model_config": config,
        "rows_file": str(folder / "pairs.jsonl"),
        "sequences_per_step": -(-len(pack(pair_tokens, 2 * longest)) // steps),
    }


def measure(contender: str, folder: Path, settings: Figures) -> Figures:
    """Run one contender in a process of its own. Returns its result.json with the figures of the timed steps."""
    folder.mkdir()
    task = json.dumps({**settings, "contender": contender, "folder": str(folder)})
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        with running(script_command("preference_contenders", task), log, environment) as child:
            child.wait()
        if child.returncode:
            reason = failure_reason(log, child.returncode)
            raise UserError(f"{contender} could not be measured: {reason} (--only measures some of the contenders)")
    line: Figures = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    timed = list(zip(line["seconds"], line["tokens"], strict=True))[_WARMUP:]
    rate = statistics.median(tokens / seconds for seconds, tokens in timed)
    tokens = sum(line["tokens"])
    return line | {
        "step_seconds": statistics.median(seconds for seconds, _ in timed),
        "tokens_per_second": rate,
        "with_reference": tokens / (tokens / rate + line["reference_seconds"]),
    }


def compute_medians(measurements: list[Figures]) -> list[Figures]:
    """Return the medians of each contender, with the range of its steps and its counts, equal in all repetitions."""
    lines = []
    for name in dict.fromkeys(line["contender"] for line in measurements):
        runs = [line for line in measurements if line["contender"] == name]
        keys = ("step_seconds", "tokens_per_second", "reference_seconds", "with_reference")
        line: Figures = {"contender": name, **{key: statistics.median(run[key] for run in runs) for key in keys}}
        line["fastest"], line["slowest"] = (edge(run["step_seconds"] for run in runs) for edge in (min, max))
        for key in ("pairs", "tokens", "trained_tokens", "computed_tokens"):
            line[key] = sum(runs[0][key])
        line["steps"], line["first_loss"] = len(runs[0]["seconds"]), runs[0]["losses"][0]
        lines.append(line)
    return lines


def _ratios(medians: list[Figures]) -> dict[str, dict[str, float]]:
    """Return by how many times ours is faster than each contender of TRL, in the steps and with the reference."""
    ours = next((line for line in medians if line["contender"] == "ours"), None)
    keys = ("tokens_per_second", "with_reference")
    return {
        line["contender"]: {key: ours[key] / line[key] for key in keys} for line in medians if ours and line is not ours
    }


def format_table(record: Figures) -> str:
    """Return the table, the ratios and the workload."""
    settings, medians = record["settings"], record["medians"]
    rows = []
    for line in medians:
        cells = [
            CONTENDERS[line["contender"]],
            f"{line['step_seconds']:.2f} ({line['fastest']:.2f}-{line['slowest']:.2f})",
            f"{line['pairs'] / line['steps']:.1f}",
            f"{line['tokens_per_second']:,.0f}",
            f"{line['computed_tokens']:,} ({line['computed_tokens'] / line['tokens']:.2f})",
            f"{line['reference_seconds']:.1f} s" if line["reference_seconds"] else "–",
            f"{line['with_reference']:,.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    ratios = [
        f"- {CONTENDERS['ours']}: {ratio['tokens_per_second']:.2f} times as fast as {CONTENDERS[name]}; with the "
        f"reference, in one epoch, {ratio['with_reference']:.2f} times"
        for name, ratio in record["ratios"].items()
    ]
    first, config = medians[0], settings["model_config"]
    losses = ", ".join(f"{line['first_loss']:.4f}" for line in medians)
    return "\n".join(
        [
            "| | s/step (range) | pairs/step | tokens/s | computed (per token) | reference | tokens/s with it |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            *ratios,
            f"- the same ids and labels in all {first['pairs']} pairs: {first['tokens']:,} tokens, "
            f"{first['trained_tokens']:,} of them trained; loss of the first step: {losses}",
            "",
            f"Medians of {settings['repeat']}, contenders in turns, each in a fresh process, steps after the first. "
            f"Model: {config['model_type']}, {config['num_hidden_layers']} layers, hidden size "
            f"{config['hidden_size']:,}, vocabulary {config['vocab_size']:,}, float32. Prompts with answer of up to "
            f"{settings['max_length']:,} tokens; TRL's micro-batch has {settings['batch']} pairs, ours "
            f"{2 * settings['max_length']:,} tokens. Seed {settings['seed']}.",
        ]
    )
