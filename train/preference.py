r"""Preference training from a recipe: DPO, ORPO or a reward model on pairs of a chosen and a rejected answer.

    accelerate launch --config_file accelerate_configs/zero3.yaml \
        train/preference.py --recipe my.yaml preference.beta=0.05

    python train/preference.py --recipe my.yaml --check

The recipe is one of train/sft.py with the section `preference`; options and exit codes are the same. With DPO the
log-probabilities of the model before training are computed once, before the first step, and kept in data.cache_dir.
"""

from train import sft
from train.cli import exit_with


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return sft.main(arguments, "train/preference.py", __doc__)


if __name__ == "__main__":
    exit_with(main)
