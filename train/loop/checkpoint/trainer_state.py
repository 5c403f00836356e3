"""What a checkpoint holds of a run that transformers forgets, so that one that goes on is the one that was never left.

Figures since the last logging step, the position in the data, an evaluation that was given up: without them the weights
may go on exactly, and metrics.jsonl doesn't.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from train.data.chat.template import date_of
from train.data.prepare import Prepared
from train.loop.checkpoint import deepspeed as universal
from train.loop.checkpoint.best_model import BestModel
from train.loop.checkpoint.manifest import UNSHARDED, Checkpoint
from train.loop.checkpoint.resume import run_fingerprint
from train.loop.checkpoint.resumed_settings import shift_of_steps
from train.ranks import is_first_rank
from train.recipe.schedule import sequences_per_step

if TYPE_CHECKING:
    from train.loop.trainer import JanusTrainer

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "janus-sft")


class RunState(TrainerCallback):
    """The state of a trainer's run beside the model, the optimizer and what transformers keeps."""

    def __init__(self, trainer: "JanusTrainer") -> None:
        self._trainer = trainer
        self.evaluation_is_due = False
        """Whether an evaluation was given up as the run had to stop."""
        self.best = BestModel(trainer)
        self.schedule_was_held = False
        """Whether DeepSpeed left the step out that is ending."""
        self.shift = 0
        """Steps done, less those that epochs as they are now would have taken to get as far in the data."""
        self._going_on: Checkpoint | None = None
        self._loaded_from = Path()
        self._learning_rate: float | None = None
        self._epoch_ends = False
        """Whether the end of an epoch follows on this step: what is due there hasn't been done."""
        self._over = False

    def go_on_from(self, checkpoint: Checkpoint) -> Path:
        """Take up the state in this checkpoint when training begins. The folder that it is to be loaded from."""
        self._going_on, self._loaded_from = checkpoint, self.loadable(checkpoint)
        if universal.is_universal(self._loaded_from):
            universal.expect(self._trainer.accelerator.state.deepspeed_plugin)
        return self._loaded_from

    def find_position(self, steps_per_epoch: int) -> int:
        """Find where the run goes on in epochs of so many steps: `shift`."""
        if self._going_on is not None:
            sequences, of_step = self._sizes()
            self.shift = shift_of_steps(self._going_on, sequences, of_step, steps_per_epoch)
        return self.shift

    def loadable(self, checkpoint: Checkpoint) -> Path:
        """The checkpoint's folder; in the form for any number of processes where DeepSpeed wrote it on another."""
        arguments = self._trainer.args
        if not self._trainer.is_deepspeed_enabled or checkpoint.manifest["processes"] == arguments.world_size:
            return checkpoint.folder
        return universal.universal_form(checkpoint, arguments.output_dir, arguments.world_size)

    def forget_other_forms(self) -> None:
        """Delete what `loadable` made, once all processes have loaded it."""
        self._trainer.accelerator.wait_for_everyone()
        if is_first_rank():
            universal.forget(self._trainer.args.output_dir)

    def write(self, folder: Path) -> None:
        """Put this process's state into a checkpoint."""
        trainer = self._trainer
        state = {
            "loss": trainer._tr_loss.item(),
            "last_logged": trainer._globalstep_last_logged,
            "throughput": trainer._throughput.state(),
            "recent_losses": trainer._guards.state(),
            "evaluation_is_due": self.evaluation_is_due,
            "epoch_ends": self._epoch_ends,
            "grad_norm": float(trainer.grad_norm),
            "learning_rate": self._learning_rate,
        }
        path = folder / f"run_state_{trainer.args.process_index}.json"
        path.write_text(json.dumps(state), encoding="utf-8")

    def manifest(self) -> dict[str, Any]:
        """What COMPLETE.json says of the run, besides the files."""
        trainer = self._trainer
        recipe, state, arguments = trainer._recipe, trainer.state, trainer.args
        wandb = sys.modules.get("wandb")
        run = wandb.run if wandb else None
        return {
            "step": state.global_step,
            "epoch": state.epoch,
            "sequences": self._consumed(),
            "sequences_per_epoch": self._sizes()[0],
            "tokens": state.num_input_tokens_seen,
            "run": {**run_fingerprint(recipe), **trainer._about},
            "processes": arguments.world_size,
            "sequences_per_step": sequences_per_step(recipe, arguments.world_size),
            "distribution": sharding(arguments),
            "packages": {name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)},
            "wandb_run": run.id if run else None,
        }

    def _sizes(self) -> tuple[int, int]:
        """Sequences of an epoch and of a step."""
        trainer, arguments = self._trainer, self._trainer.args
        sequences, at_once = len(trainer.train_dataset), arguments.train_batch_size * arguments.world_size
        if arguments.dataloader_drop_last:
            sequences = sequences // at_once * at_once
        return sequences, at_once * arguments.gradient_accumulation_steps

    def _consumed(self) -> int:
        """Sequences that were trained, each as often as it was: a smaller step ends an epoch."""
        sequences, of_step = self._sizes()
        done = self._trainer.state.global_step - self.shift
        epochs, steps = divmod(done, max(-(-sequences // of_step), 1))
        return epochs * sequences + min(steps * of_step, sequences)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate of the step, which is logged."""
        self._learning_rate = float(self._trainer._get_learning_rate())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note whether an epoch ends here, or the run.

        DeepSpeed holds the learning rate's schedule back at a step that it leaves out; it counts like any other.
        """
        self._epoch_ends = state.epoch == int(state.epoch or 0) or state.global_step >= state.max_steps
        if self.schedule_was_held:
            self.schedule_was_held = False
            engine: Any = self._trainer.model_wrapped
            (engine.lr_scheduler or self._trainer.lr_scheduler).step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What is due at the end of an epoch comes now; where the run was over when it was gone on with, it is done."""
        self._epoch_ends = False
        if self._over:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the figures since the last logging step, and make good an evaluation that was given up.

        Where there are other processes now, the first one goes on from the states of those that are gone.
        """
        if self._going_on is None:
            return
        self._over = state.global_step >= state.max_steps
        trainer = self._trainer
        if self._over and is_first_rank() and trainer.length_changed():
            print(
                f"nothing is trained: this recipe ends at step {state.max_steps:,}, and {self._going_on.folder.name} "
                f"has done {state.global_step:,} already. Its model is saved as the finished one.",
                flush=True,
            )
        states = {int(path.stem.rpartition("_")[2]): path for path in self._loaded_from.glob("run_state_*.json")}
        read = {rank: json.loads(path.read_text(encoding="utf-8")) for rank, path in states.items()}
        rank, ranks = args.process_index, args.world_size
        losses = [one["loss"] for one in read.values()]
        # the mean over the processes is logged
        trainer._tr_loss.fill_(read[rank]["loss"] if len(read) == ranks else sum(losses) / len(losses))
        trainer._globalstep_last_logged = read[0]["last_logged"]
        own = [one for number, one in sorted(read.items()) if number == rank or (rank == 0 and number >= ranks)]
        trainer._throughput.load([one["throughput"] for one in own])
        for one in own[:1]:
            trainer._guards.load(one["recent_losses"])
        self.forget_other_forms()
        self.best.go_on_from(self._going_on)
        self._going_on = None
        if read[0]["evaluation_is_due"]:
            metrics = trainer._evaluate(None, None)
            if trainer._determine_best_metric(metrics, None) and args.save_strategy == "best":
                trainer._save_checkpoint(trainer.model_wrapped, None)
        if read[0]["epoch_ends"]:
            over, self._over = self._over, False
            trainer.end_epoch(read[0]["grad_norm"], read[0]["learning_rate"])
            self._over = over

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say where the run doesn't end with the model that it was to end with."""
        self.best.tell()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the order its epoch: accelerate loses it where several processes go on within one."""
        if self._trainer.order is not None and state.epoch is not None:
            self._trainer.order.set_epoch(int(state.epoch))


def facts_of_data(data: Prepared, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a run trains on: the tokens of each source, which rows, how they are packed, template and date."""
    plan = data.train.dataset.plan_of(0)
    packed = xxhash.xxh3_128(plan.rows.tobytes() + plan.ends.tobytes()).hexdigest()
    chosen = [part.dataset.digest() for part in (data.train, data.validation) if part]
    day = date_of(tokenizer)
    return {
        "made.tokens": [{"source": cache.source, **cache.tokens} for cache in data.caches],
        "made.rows": xxhash.xxh3_128("".join(chosen).encode()).hexdigest(),
        "made.sequences": packed,
        "made.template": xxhash.xxh3_128(str(tokenizer.chat_template).encode()).hexdigest(),
        **({"made.date": day.isoformat()} if day else {}),
    }


def sharding(arguments: TrainingArguments) -> str:
    """How the states of the optimizer lie in a checkpoint."""
    if arguments.deepspeed_plugin is not None:
        return f"DeepSpeed ZeRO-{arguments.deepspeed_plugin.zero_stage}"
    return "FSDP" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else UNSHARDED


def files_expected(trainer: "JanusTrainer") -> Iterator[str]:
    """Patterns of files that a whole checkpoint of this run must have, of each process."""
    yield "trainer_state.json"
    if trainer.args.save_only_model:
        return
    ranks = trainer.args.world_size
    for rank in range(ranks):
        yield f"run_state_{rank}.json"
        yield f"rng_state_{rank}.pth" if ranks > 1 else "rng_state.pth"
        if trainer.is_deepspeed_enabled:
            yield f"global_step*/*zero_pp_rank_{rank}_mp_rank_*optim_states.pt"
    yield "scheduler.pt"
    if trainer.is_deepspeed_enabled:
        yield from ("latest", "global_step*/*model_states.pt")
    elif not trainer.is_fsdp_enabled:
        yield "optimizer.pt"


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
