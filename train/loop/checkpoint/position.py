"""Position in the data: how many sequences a run has trained, and where it resumes if its epochs have changed."""

from dataclasses import dataclass

from transformers import TrainingArguments

from train.loop.checkpoint.manifest import Checkpoint
from train.ranks import is_first_rank
from train.recipe.schedule import data_parallel


@dataclass
class DataPosition:
    """Optimizer steps as a position in the data.

    `sequences`: per epoch, without those that dataloader_drop_last leaves out. `sequences_per_step`: of all processes
    and accumulation steps. `shift`: steps done minus the steps that epochs as they are now take to get as far in the
    data. It is 0 unless the batch or the rows have changed since the checkpoint.
    """

    sequences: int
    sequences_per_step: int
    shift: int = 0

    @classmethod
    def from_arguments(cls, arguments: TrainingArguments, sequences: int, sequence_parallel: int = 1) -> "DataPosition":
        """Return the position of a run on `sequences` that begins; `sequence_parallel` processes share each."""
        batch = arguments.train_batch_size * data_parallel(arguments.world_size, sequence_parallel)
        if arguments.dataloader_drop_last:
            sequences = sequences // batch * batch
        return cls(sequences, batch * arguments.gradient_accumulation_steps)

    def consumed(self, step: int) -> int:
        """Return the sequences trained after `step` steps, repeated ones included; the last step of an epoch is
        smaller."""
        steps_per_epoch = max(-(-self.sequences // self.sequences_per_step), 1)
        epochs, steps = divmod(step - self.shift, steps_per_epoch)
        return epochs * self.sequences + min(steps * self.sequences_per_step, self.sequences)

    def resume(self, checkpoint: Checkpoint, steps_per_epoch: int) -> None:
        """Set `shift` to where `checkpoint` lies in epochs of `steps_per_epoch`.

        Steps are counted on from the checkpoint all the same: a run that counted from 0 would overwrite its own
        checkpoints.
        """
        manifest = checkpoint.manifest
        done, epoch = int(manifest["sequences"]), float(manifest["epoch"] or 0)
        before = int(manifest.get("sequences_per_epoch") or (round(done / epoch) if epoch else self.sequences)) or 1
        epochs, rest = divmod(done, before)
        steps, repeated = divmod(rest * self.sequences // before, self.sequences_per_step)
        self.shift = checkpoint.step - epochs * steps_per_epoch - steps
        if self.shift and repeated and is_first_rank():
            print(
                f"{checkpoint.folder.name} lies inside a step of {self.sequences_per_step:,} sequences: its first "
                f"{repeated:,} sequences are trained a second time",
                flush=True,
            )
