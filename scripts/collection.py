r"""Build a collection of system messages that ask for different things of the same instruction (arXiv:2405.17977).

    vllm serve Qwen/Qwen2.5-14B-Instruct      # any OpenAI-compatible server
    python scripts/collection.py \
        --config recipes/collection/qwen2.5-14b-instruct.yaml

What a server answers is written down at once: stop it with Ctrl-C or lose the machine, and the same command goes on
where it was, asking nothing twice. The rows are in OUTPUT_DIR/data, in the columns of Multifaceted Collection, which
train/sft.py reads as they are; preference pairs in OUTPUT_DIR/pairs; what they amount to in OUTPUT_DIR/report.md.
--check reads the configuration, the hierarchy and all rows, and asks each server for one token with the settings of
each stage. Exit codes as of train/sft.py; 2 also where no row is left to train on, or rows were lost for a reason that
no setting accepts (see `accept_losses`); 130 after Ctrl-C.
"""

import sys
from collections import Counter
from contextlib import nullcontext

try:
    from train.datagen import command
    from train.datagen.deduplication import NearDuplicateFilter
    from train.errors import UserError
    from train.multifaceted.collection.config import STAGES, CollectionConfig, load_config
    from train.multifaceted.collection.hierarchy import PreferencePlan, load_hierarchy
    from train.multifaceted.collection.instructions import instructions
    from train.multifaceted.collection.run import run
    from train.multifaceted.collection.stats import CollectionStats
except KeyboardInterrupt:  # the imports take a second or more
    sys.exit(130)


def check(config: CollectionConfig) -> None:
    """Say what a run would do, after reading every row. Raises UserError."""
    hierarchy = load_hierarchy(config.hierarchy.file, ours=config.hierarchy.ours)
    PreferencePlan(hierarchy, config.sets_per_instruction, config.seed)
    subs = [sub for of in hierarchy.values() for sub in of.values()]
    preferences = sum(len(sub.preferences) for sub in subs)
    print(f"hierarchy: {len(hierarchy)} dimensions, {len(subs):,} sub-dimensions, {preferences:,} preferences")
    rows = kept = 0
    left_out: Counter[str] = Counter()
    events: Counter[str] = Counter()
    examples: dict[str, str] = {}
    threshold = config.filter.near_duplicates
    with nullcontext() if threshold is None else NearDuplicateFilter(threshold) as near:
        for one in instructions(config.data, config.filter, near):
            rows += 1
            kept += one.number is not None
            events.update(one.events)
            if one.reason is not None:
                left_out[one.reason] += 1
                examples.setdefault(one.reason, f"{one.place}{f': {one.detail}' if one.detail else ''}")
    print(f"{rows:,} rows, {kept:,} instructions")
    for what, count in events.most_common():
        print(f"{count:,} times: {what}")
    for reason, count in left_out.most_common():
        print(f"left out: {count:,} ({count / rows:.1%}): {reason}; the first: {examples[reason]}")
    if not kept:
        raise UserError(
            f"no row becomes an instruction: {command.format_drop_reasons(rows, left_out)}. Mend the data, or the settings of "
            "`filter`."
        )
    sets = kept * config.sets_per_instruction
    requests = sets * (4 if config.preferences == "proposed" else 3) + kept * config.filter.model
    places = sum(server.concurrency for server in config.servers)
    print(f"about {requests:,} requests to {config.model}, {places:,} at once, for {sets:,} sets that pass at once")


def tell(stats: CollectionStats, time: str) -> None:
    """Print what became of the instructions and their sets."""
    print(
        f"{stats.written:,} rows and {stats.pairs:,} pairs of {stats.instructions:,} instructions "
        f"({stats.rows:,} rows read) after {time}"
    )
    for what, total, left_out in (
        ("instructions", stats.rows, stats.left_out),
        ("sets", stats.sets, stats.sets_left_out),
    ):
        for reason, count in left_out.most_common():
            print(f"{what} left out: {count:,} ({count / total:.1%}): {reason}")


def lost(stats: CollectionStats) -> Counter[str]:
    """How many instructions, and how many sets, each reason left out."""
    return stats.left_out + Counter({f"{reason} (sets)": count for reason, count in stats.sets_left_out.items()})


def asked_stages(config: CollectionConfig) -> list[str]:
    """Return the stages that a run asks for."""
    left_out = {"screen": not config.filter.model, "propose": config.preferences != "proposed"}
    return [stage for stage in STAGES if not left_out.get(stage)]


def main() -> int:
    """Run the command; the exit code."""
    return command.main(__doc__, load_config, check, run, tell, lost, asked_stages)


if __name__ == "__main__":
    sys.exit(main())
