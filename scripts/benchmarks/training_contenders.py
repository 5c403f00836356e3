"""Some training steps, measured: scripts/benchmark.py starts this file afresh for each contender.

    python scripts/benchmarks/training_contenders.py '{"contender": "full+liger=on", "lengths": {...}, "folder": ...}'

The model has the shape of its config and random weights, made on the device. The rows are random token ids in the
lengths of Multifaceted Collection: speed depends on lengths, not on what is said, and so no tokenizer is needed.
Writes result.json into the task's folder: what is known before training, then all of it.
"""

import json
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback

from benchmarks.rows import lengths
from benchmarks.training_settings import KERNELS, RECIPES, Contender, Lengths, Task, by_name
from train.errors import UserError
from train.model.architecture import Architecture, inspect_architecture
from train.model.attention.selection import AttentionChoice, select_attention
from train.model.flops import count_training_flops, peak_flops
from train.preflight.plan.cluster import Cluster
from train.preflight.plan.plan import plan_run
from train.recipe import Recipe, load_recipe
from train.warning_filters import filter_known_warnings

CHARACTERS_A_TOKEN = 4.03
"""Of Mistral's tokenizer (v1), in 400 rows of rows.py: 4.03 in system messages, 4.05 in questions, 4.03 in
answers."""
TEMPLATE_TOKENS = 10
"""mistral-system's: <s>[INST] before the prompt, a line break in it, [/INST] behind it; </s> is part of the answer."""
_FIRST_ID = 3  # those before are <unk>, <s> and </s>


def row_lengths(wanted: Lengths) -> Iterator[tuple[int, int]]:
    """Tokens of the prompt and of the answer of each row that `max_length` holds; longer ones are left out for all."""
    chance = random.Random(wanted.seed)
    for _ in range(wanted.rows):
        characters = lengths(chance)
        asked = round((characters["system"] + characters["user"]) / CHARACTERS_A_TOKEN) + TEMPLATE_TOKENS
        answered = round(characters["assistant"] / CHARACTERS_A_TOKEN) + 1
        if asked + answered <= wanted.max_length:
            yield asked, answered


def token_ids(wanted: Lengths) -> Iterator[tuple[NDArray[np.int32], int]]:
    """The ids of each row, and where its answer begins. A few ids are frequent, as in text."""
    vocabulary, chance = (
        config_of(wanted).get_text_config().vocab_size,
        np.random.Generator(np.random.PCG64(wanted.seed)),
    )
    for asked, answered in row_lengths(wanted):
        rank = np.exp(chance.random(asked + answered) * np.log(vocabulary - _FIRST_ID))  # Zipf's law
        yield (rank.astype(np.int32) + _FIRST_ID - 1).clip(_FIRST_ID, vocabulary - 1), asked


def tokenizer() -> Any:
    """What trainers want to see, where nothing is left to tokenize."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def device() -> torch.device:
    """A GPU where there is one. Raises UserError for accelerators that this benchmark can't time."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is not None and found.type != "cuda":
        raise UserError(f"this benchmark measures on CUDA and ROCm GPUs, or on the CPU; here is {found.type}")
    return found or torch.device("cpu")


def config_of(wanted: Lengths) -> PreTrainedConfig:
    """The model's config, a new one each time: a model that is made of it leaves its dtype and kernel there."""
    return AutoConfig.for_model(**wanted.config)


def random_model(wanted: Lengths, dtype: str, attention: str | None = None) -> PreTrainedModel:
    """Weights of the seed, made where they are used: no gigabytes on disk, and none in the host's memory."""
    torch.manual_seed(wanted.seed)
    options = {} if attention is None else {"attn_implementation": attention}
    with device():
        return AutoModelForCausalLM.from_config(config_of(wanted), dtype=getattr(torch, dtype), **options)


class Watch(TrainerCallback):
    """When each step ended, with all work on the device done, and the memory around it."""

    def __init__(self) -> None:
        self.on_gpu = device().type == "cuda"
        self.ends: list[float] = []
        self.inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.losses: list[torch.Tensor] = []
        self.memory: dict[str, int] = {}

    def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
        """Peaks are counted from here: what making the model took is none of training's."""
        if self.on_gpu:
            self.memory["before"] = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def on_epoch_begin(self, *arguments: Any, **kwargs: Any) -> None:
        """The first step begins."""
        if not self.ends:
            self.ends.append(self._now())

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        """A step has ended, its gradients are gone."""
        self.ends.append(self._now())

    def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
        """Note the memory: between steps weights and optimizer states are left."""
        if self.on_gpu:
            self.memory["between_steps"] = torch.cuda.memory_allocated()
            self.memory["peak_allocated"] = torch.cuda.max_memory_allocated()
            self.memory["peak_reserved"] = torch.cuda.max_memory_reserved()

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.monotonic()

    def steps(self, shape: Architecture, warmup: int) -> list[dict[str, Any]]:
        """Each step: seconds, the documents that were trained and what they took."""
        found = []
        measured = zip(self.ends, self.ends[1:], self.inputs, self.losses, strict=False)
        for number, (start, end, (labels, positions), loss) in enumerate(measured):
            starts = np.flatnonzero(positions.flatten().cpu().numpy() == 0)
            documents = np.diff(starts, append=positions.numel())
            found.append(
                {
                    "warmup": number < warmup,
                    "seconds": end - start,
                    "documents": documents.tolist(),
                    "tokens": int(documents.sum()),
                    "trained_tokens": int((labels >= 0).sum()),
                    "flops": count_training_flops(shape, documents).total,
                    "loss": float(loss),
                }
            )
        return found


def watched(trainer: type) -> type:
    """A trainer that tells its `watch` of each step; nothing else changes."""

    class Watched(trainer):
        watch: Watch

        def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any, **kwargs: Any) -> Any:
            self.watch.inputs.append((inputs["labels"], inputs["position_ids"]))
            loss = super().training_step(model, inputs, *arguments, **kwargs)
            self.watch.losses.append(loss)
            return loss

    return Watched


def trl(task: Task, dtype: str, recipe: Recipe, watch: Watch) -> tuple[Any, int]:
    """SFTTrainer as its users get it, on rows that are tokenized already and which it packs itself."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from train.data.loss_mask import NOT_TRAINED
    from train.model.adapters import lora_config

    wanted = task.lengths
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for ids, answer in token_ids(wanted):
        rows["input_ids"].append(ids)
        rows["labels"].append(np.where(np.arange(len(ids)) < answer, NOT_TRAINED, ids))
    arguments = SFTConfig(
        output_dir=str(task.folder / "run"),
        max_length=wanted.max_length,
        packing=True,
        per_device_train_batch_size=wanted.batch,
        max_steps=wanted.warmup + wanted.steps,
        seed=wanted.seed,
        use_cpu=not watch.on_gpu,
        save_strategy="no",
        report_to="none",
    )
    trainer = watched(SFTTrainer)(
        model=random_model(wanted, dtype),
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=lora_config(recipe.adapter),
        callbacks=[watch],
    )
    return trainer, len(trainer.train_dataset)


def ours(task: Task, attention: str, recipe: Recipe, watch: Watch) -> tuple[Any, int]:
    """JanusTrainer as train/sft.py makes it, on sequences from rows on disk."""
    from train.data.dataset import PackedDataset
    from train.data.loss_mask import EncodedRow
    from train.data.packing import plan_packing
    from train.data.prepared_data import PreparedData, Split, SplitStats
    from train.data.sources.formats import Conversation
    from train.data.tokens.table import TokenTable, make_batch, write_table
    from train.loop.arguments import training_arguments
    from train.loop.metrics_log import StepLog
    from train.loop.trainer import JanusTrainer

    wanted, file = task.lengths, task.folder / "rows.arrow"
    encoded = [EncodedRow(ids, np.array([[answer, len(ids)]], np.int32)) for ids, answer in token_ids(wanted)]
    said = [{"role": "user", "content": "a row of the benchmark"}]
    write_table(
        file, [make_batch(0, [(Conversation(said, None, f" row {n}"), [row]) for n, row in enumerate(encoded, 1)])]
    )
    rows = TokenTable([file], [["benchmark"]])
    sequences = PackedDataset(
        rows,
        np.arange(len(rows)),
        wanted.max_length,
        lambda epoch: plan_packing(
            rows.lengths, wanted.max_length, multiple_of=wanted.batch, seed=wanted.seed, epoch=epoch
        ),
        packed=True,
    )
    arguments = training_arguments(recipe)
    step_log = StepLog(recipe.output_dir)
    Path(recipe.output_dir).mkdir()
    trainer = watched(JanusTrainer)(
        recipe,
        arguments,
        random_model(wanted, recipe.model.dtype, attention),
        tokenizer(),
        PreparedData(Split(sequences, SplitStats()), None),
        [step_log, watch],
    )
    return trainer, len(sequences)


def recipe_of(contender: Contender, wanted: Lengths, folder: Path) -> Recipe:
    """The recipe with the contender's changes, and what is made equal for all."""
    return load_recipe(
        RECIPES[contender.method],
        [
            *contender.overrides(),
            f"data.max_length={wanted.max_length}",
            "data.validation=null",
            f"training.per_device_train_batch_size={wanted.batch}",
            "training.gradient_accumulation_steps=1",
            f"training.max_steps={wanted.warmup + wanted.steps}",
            "training.eval_strategy='no'",
            "training.save_strategy='no'",
            "tracking.wandb=null",
            f"output_dir={json.dumps(str(folder / 'run'))}",
            f"seed={wanted.seed}",
        ],
    )


def foretold(recipe: Recipe, shape: Architecture, wanted: Lengths) -> dict[str, int]:
    """What `train/sft.py --check --gpus` would say of one GPU, part by part, in bytes."""
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    cluster = Cluster(1, 1, "here", total, 1.0, assumed=False, mfu=1.0)
    sizes = np.array([sum(row) for row in row_lengths(wanted)])
    found = plan_run(recipe, shape, cluster, sizes, steps=wanted.steps, epochs=1, sequences_per_step=wanted.batch)
    memory = vars(found.candidates[0].memory)
    return {name: value for name, value in memory.items() if isinstance(value, int) and name != "host"}


def measure(task: Task) -> None:
    """Train with the contender that the task names, and write what came of it."""
    assert task.contender is not None
    contender, wanted, result = by_name(task.contender), task.lengths, task.folder / "result.json"
    recipe = recipe_of(contender, wanted, task.folder)
    shape = inspect_architecture(recipe, config_of(wanted))
    known: dict[str, Any] = {"parameters": shape.total, "trained_parameters": shape.trained}
    watch = Watch()
    if contender.dtype:
        trainer, sequences = trl(task, contender.dtype, recipe, watch)
    else:
        known["foretold"] = foretold(recipe, shape, wanted)
        result.write_text(json.dumps(known), encoding="utf-8")
        trainer, sequences = ours(task, select_attention(recipe, config_of(wanted)).kernel, recipe, watch)
    trainer.watch = watch
    known |= {"sequences": sequences, "used": used(trainer)}
    result.write_text(json.dumps(known), encoding="utf-8")
    trainer.train()
    known |= {
        "seconds_to_first_step": watch.ends[1] - task.started,
        "memory": watch.memory or None,
        "steps": watch.steps(shape, wanted.warmup),
    }
    result.write_text(json.dumps(known), encoding="utf-8")


def used(trainer: Any) -> dict[str, Any]:
    """What a trainer works with, as it says itself: of TRL, its defaults."""
    arguments, model = trainer.args, trainer.model
    selective = bool((arguments.gradient_checkpointing_kwargs or {}).get("selective"))
    return {
        "attention": model.config._attn_implementation,
        "checkpointing": ("selective" if selective else "full") if arguments.gradient_checkpointing else "none",
        "liger": "on" if arguments.use_liger_kernel else "off",
        "compile": "on" if arguments.torch_compile else "off",
        "optim": str(getattr(arguments.optim, "value", arguments.optim)),
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "logging_steps": arguments.logging_steps,
    }


def probe(task: Task) -> None:
    """Write what this machine is, and why not each attention kernel, in the words of train/model/attention/selection.py."""
    recipe = recipe_of(by_name("full"), task.lengths, task.folder)

    def choice(kernel: str) -> AttentionChoice:
        model = recipe.model.model_copy(update={"attention": kernel})
        return select_attention(recipe.model_copy(update={"model": model}), config_of(task.lengths))

    def fault(kernel: str) -> str | None:
        try:
            choice(kernel)
        except UserError as refused:
            return str(refused)
        return None

    here: dict[str, Any] = {"device": "cpu", "memory_bytes": None, "peak_flops": None, "cuda": torch.version.cuda}
    if device().type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
        here |= {"device": properties.name, "memory_bytes": properties.total_memory, "capability": capability}
        here["peak_flops"] = peak_flops(properties.name)
    automatic = choice("auto")
    here |= {"automatic": automatic.kernel, "automatic_reasons": automatic.reasons}
    here["kernels"] = {kernel: fault(kernel) for kernel in KERNELS}
    (task.folder / "result.json").write_text(json.dumps(here), encoding="utf-8")


def main() -> int:
    """Run one task; the exit code."""
    filter_known_warnings()
    warnings.filterwarnings("ignore", message="`use_liger_kernel=True` is deprecated", category=FutureWarning)
    task = Task.from_json(sys.argv[1])
    os.environ["HF_DATASETS_CACHE"] = str(task.folder / "cache")  # before datasets is imported
    try:
        if task.contender is None:
            probe(task)
        else:
            measure(task)
    except Exception as fault:  # of kernels, compilers and memory, which share no class; what is known stays known
        result = task.folder / "result.json"
        known = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        result.write_text(json.dumps({**known, "reason": reason(fault)}), encoding="utf-8")
        if not isinstance(fault, UserError):
            raise
        return 2
    return 0


def reason(fault: Exception) -> str:
    """Why it could not be measured, in one line."""
    said = " ".join(str(fault).split())
    if isinstance(fault, UserError):
        return said
    if isinstance(fault, torch.OutOfMemoryError):
        return f"out of memory: {said}"
    return f"{type(fault).__name__}: {said[:500]}"


if __name__ == "__main__":
    sys.exit(main())
