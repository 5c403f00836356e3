"""Warnings of the libraries below that no user can act on, left out by name so that the others are read."""

import logging
import warnings

UNHELPFUL = {
    "trl.trainer.sft_trainer": ("per_device_train_batch_size of 1 with padding-free",),  # a packed row is a full batch
    "transformers.trainer": ("missing keys in the checkpoint model loaded: ['lm_head.weight']",),  # tied weights
    "DeepSpeed": ("Setting accelerator to CPU", "OVERFLOW! Skipping step"),  # of the second our guards tell, with rows
    "accelerate.accelerator": ("Gradient accumulation steps mismatch",),  # the Trainer's own way under DeepSpeed
    "torchao": ("Failed to load",),  # its kernels for other GPUs; transformers imports it wherever it is installed
    "torchao.kernel.intmm": ("Detected no triton",),  # said of its 8-bit integers
    "torch.utils._pytree": ("register_constant",),  # torchao registers what torch 2.13 knows by itself
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # an optional, faster CPU kernel
}
UNHELPFUL_FUTURE_WARNINGS = (
    ".*`?gradient_checkpointing.*",  # TRL 1.16 sets it under its old name itself
    ".*torch.distributed.*",  # torch 2.13 has one for each collective that DeepSpeed calls
)
UNHELPFUL_USER_WARNINGS = (
    ".*a tied layer is part of the adapter.*",  # peft's; such weights are saved and merged apart here
)


class _LeaveOut(logging.Filter):
    def __init__(self, phrases: tuple[str, ...]) -> None:
        super().__init__()
        self.phrases = phrases

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(phrase in message for phrase in self.phrases)


def filter_known_warnings() -> None:
    """Call it before the libraries are imported."""
    for name, phrases in UNHELPFUL.items():
        logging.getLogger(name).addFilter(_LeaveOut(phrases))
    for message in UNHELPFUL_FUTURE_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    for message in UNHELPFUL_USER_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
