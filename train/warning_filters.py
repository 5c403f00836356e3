"""Filters for known warnings of dependencies that no user can act on."""

import logging
import warnings

LOG_MESSAGES = {
    "trl.trainer.sft_trainer": ("per_device_train_batch_size of 1 with padding-free",),  # a packed row is a full batch
    "transformers.trainer": ("missing keys in the checkpoint model loaded: ['lm_head.weight']",),  # tied weights
    "transformers.modeling_utils": ("ForSequenceClassification LOAD REPORT",),  # a reward model's new head is missing
    "DeepSpeed": (
        "Setting accelerator to CPU",
        "OVERFLOW! Skipping step",
    ),  # our guards report skipped steps, with rows
    "accelerate.accelerator": ("Gradient accumulation steps mismatch",),  # caused by the Trainer under DeepSpeed
    "torchao": ("Failed to load",),  # kernels for other GPUs; transformers imports torchao wherever it is installed
    "torchao.kernel.intmm": ("Detected no triton",),  # about 8-bit integers, which are not used
    "torch.utils._pytree": ("register_constant",),  # torchao registers a class that torch 2.13 registers itself
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # an optional, faster CPU kernel
}
"""Phrases of log messages to filter, by logger."""
FUTURE_WARNINGS = (
    ".*`?gradient_checkpointing.*",  # TRL 1.16 sets it under its old name
    ".*torch.distributed.*",  # torch 2.13 warns for each collective that DeepSpeed calls
)
USER_WARNINGS = (
    ".*a tied layer is part of the adapter.*",  # of peft; tied weights are saved and merged separately here
)


class _PhraseFilter(logging.Filter):
    def __init__(self, phrases: tuple[str, ...]) -> None:
        super().__init__()
        self.phrases = phrases

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(phrase in message for phrase in self.phrases)


def filter_known_warnings() -> None:
    """Install the filters; call it before the dependencies are imported."""
    for name, phrases in LOG_MESSAGES.items():
        logging.getLogger(name).addFilter(_PhraseFilter(phrases))
    for message in FUTURE_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    for message in USER_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
