"""Check that trained weights have float32 master copies, without which most updates of 16-bit weights are lost.

A bfloat16 number has 8 significant bits. AdamW moves a weight by about the learning rate, and an update that is smaller
than half of the weight's last bit is rounded away: at 5e-6, 92% of weights drawn from N(0, 0.02) never moved in 100
steps, and the mean change was 1.7e-5 where float32 had 2.6e-4 (tests/loop/test_master_weights.py repeats it on a
smaller scale).

    launch                            masters of 16-bit weights in full fine-tuning
    one process, DDP                  none
    DeepSpeed, stages 1 to 3          float32
    DeepSpeed, stage 0                float32 if its bf16 or fp16 section is enabled
    FSDP                              float32 if training.bf16 or fp16 is on (accelerate's `fsdp2_prepare_model`)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.errors import UserError
from train.ranks import is_launched, is_launched_by_fsdp
from train.recipe import Recipe

_SOUND_OPTIMIZERS = (
    (r"adamw_torch_[48]bit", r"bf16_stochastic_round=(?i:true|1|yes)"),  # torchao: rounds at random, right on average
    (r"adamw_anyprecision", r"use_kahan_summation=(?i:true|1|yes)"),  # torchdistx: keeps what rounding cuts off
    (r"stable_adamw", r""),  # optimi: Kahan summation for 16-bit weights, unless it is switched off
)
"""Optimizers (transformers/trainer_optimizer.py) that train 16-bit weights without losing updates, by a pattern of the
name, and of `optim_args` without spaces. All others round to the nearest number."""

_KEEP_COPIES = "accelerate_configs/zero1.yaml, zero2.yaml, zero3.yaml or fsdp2.yaml"


FULL_STATE_DICT = "FULL_STATE_DICT"


@dataclass(frozen=True)
class Launch:
    """Distribution of a run: DeepSpeed's configuration, if it is used, or FSDP; else each process has all weights.

    `state_dict`: FSDP's type of saved weights.
    """

    deepspeed: Mapping[str, Any] | None = None
    fsdp: bool = False
    state_dict: str = FULL_STATE_DICT


def read_launch(training: Mapping[str, Any], environment: Mapping[str, str]) -> Launch | None:
    """Return how this process was launched; None without a launcher, where `training` names no distribution either.

    Raises UserError for a DeepSpeed configuration that can't be read.
    """
    if launch := _launch_in_recipe(training):
        return launch
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        gathers = environment.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false").lower() == "true"
        return Launch(_read_deepspeed(file) if file != "none" else _without_file(stage, gathers=gathers))
    if is_launched_by_fsdp(environment):
        return Launch(fsdp=True, state_dict=environment.get("FSDP_STATE_DICT_TYPE", FULL_STATE_DICT))
    return Launch() if is_launched(environment) else None


def read_launch_configuration(training: Mapping[str, Any], config: Mapping[str, Any]) -> Launch:
    """Return how a run is launched by `config`, the content of a file of accelerate_configs. Raises UserError."""
    if launch := _launch_in_recipe(training):
        return launch
    if config.get("distributed_type") == "DEEPSPEED":
        settings = config.get("deepspeed_config") or {}
        file, stage = settings.get("deepspeed_config_file"), int(settings.get("zero_stage", 2))
        gathers = bool(settings.get("zero3_save_16bit_model"))
        return Launch(_read_deepspeed(file) if file else _without_file(stage, gathers=gathers))
    fsdp = config.get("fsdp_config") or {}
    return Launch(
        fsdp=config.get("distributed_type") == "FSDP",
        state_dict=str(fsdp.get("fsdp_state_dict_type", FULL_STATE_DICT)),
    )


def _launch_in_recipe(training: Mapping[str, Any]) -> Launch | None:
    if deepspeed := training.get("deepspeed"):
        return Launch(deepspeed if isinstance(deepspeed, dict) else _read_deepspeed(deepspeed))
    return Launch(fsdp=True) if training.get("fsdp") else None


def _without_file(stage: int, *, gathers: bool) -> dict[str, Any]:
    """Return the DeepSpeed configuration of accelerate's own keys. `gathers`: a save gathers the weights."""
    gathering = {"stage3_gather_16bit_weights_on_model_save": True} if gathers else {}
    return {"zero_optimization": {"stage": stage, **gathering}}


def _read_deepspeed(config: str) -> dict[str, Any]:
    """Return a DeepSpeed configuration as accelerate reads it: from a path, JSON, or JSON in base64."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig  # imports torch

    try:
        return dict(HfDeepSpeedConfig(config).config)
    except (OSError, ValueError) as error:
        raise UserError(f"the DeepSpeed configuration {config} can't be read: {error}") from error


def master_weights_error(recipe: Recipe, dtype: str, launch: Launch) -> str | None:
    """Return an error if weights of `dtype`, which model.dtype stands for, are trained without float32 masters.

    None for an adapter without `modules_to_save`: peft keeps its weights in float32 (TRL those of QLoRA in bfloat16, as
    its paper does), and the others are frozen. Copies of layers, which `modules_to_save` trains in full, stay in the
    type of the model; TRL casts those on quantized weights to bfloat16.
    """
    copies = recipe.adapter.modules_to_save if recipe.adapter else None
    if recipe.adapter is not None and not copies:
        return None
    if recipe.model.allow_16bit_training or _is_sound(recipe.training):
        return None
    if recipe.quantization is not None:
        dtype = "bfloat16"
    fp16 = bool(recipe.training.get("fp16"))
    bf16 = not fp16 and recipe.training.get("bf16") is not False
    if launch.deepspeed is not None and (error := _masters_in_16_bits(launch.deepspeed, bf16=bf16, fp16=fp16)):
        return error
    if dtype not in ("bfloat16", "float16"):
        return None
    if launch.deepspeed is not None:
        stage = int((launch.deepspeed.get("zero_optimization") or {}).get("stage", 0))
        if stage > 0 or any(_is_enabled(launch.deepspeed, *section) for section in (("bf16", bf16), ("fp16", fp16))):
            return None
        reason = "DeepSpeed at stage 0 keeps such copies only with its bf16 or fp16 section"
    elif launch.fsdp:
        if bf16 or fp16:
            return None
        reason = "FSDP makes such copies only with `training.bf16: true` (or fp16)"
    else:
        reason = "one process and DDP keep no such copies"
    auto = f"auto, here {dtype}" if recipe.model.dtype == "auto" else dtype
    subject = f"model.dtype: {auto}: full fine-tuning"
    if copies:
        subject = f"adapter.modules_to_save: training copies of {', '.join(copies)} in {dtype}"
    remedy = f"launch with {_KEEP_COPIES}, or accept it with `model.allow_16bit_training: true`."
    if recipe.quantization is None:
        remedy = f"write `model.dtype: float32` (training.bf16: true still computes in bf16), {remedy}"
    return (
        f"{subject} would lose most updates, as AdamW's are smaller than the last bit of a 16-bit weight, which needs "
        f"a float32 copy to add them up; {reason}. {remedy[0].upper()}{remedy[1:]}"
    )


def master_weights_note(recipe: Recipe, dtype: str) -> str | None:
    """Return a note for a run whose launch is not known yet, if one process or DDP would refuse it."""
    if master_weights_error(recipe, dtype, Launch()) is None:
        return None
    return (
        f"{dtype} weights are trained in full: launch with {_KEEP_COPIES}, which keep float32 copies of them. One "
        "process and ddp.yaml lose most updates and refuse to start: there write `model.dtype: float32`"
    )


def _is_sound(training: Mapping[str, Any]) -> bool:
    optimizer, arguments = str(training.get("optim")), str(training.get("optim_args") or "").replace(" ", "")
    return any(re.fullmatch(name, optimizer) and re.search(needed, arguments) for name, needed in _SOUND_OPTIMIZERS)


def _is_enabled(deepspeed: Mapping[str, Any], section: str, default: bool) -> bool:
    """Return whether DeepSpeed's section is on: transformers fills in `auto`, and accelerate a missing section."""
    enabled = deepspeed[section].get("enabled", False) if section in deepspeed else "auto"
    return default if enabled == "auto" else bool(enabled)


def _masters_in_16_bits(deepspeed: Mapping[str, Any], *, bf16: bool, fp16: bool) -> str | None:
    """Return an error if DeepSpeed's configuration asks for 16-bit masters, whatever the type of the weights."""
    for section, default in ("bf16", bf16), ("fp16", fp16):
        key = f"{section}_master_weights_and_grads"
        if _is_enabled(deepspeed, section, default) and (deepspeed.get(section) or {}).get(key):
            return (
                f"the DeepSpeed configuration has `{section}.{key}: true`: master weights in 16 bits lose most updates "
                "of full fine-tuning. Remove it, or accept it with `model.allow_16bit_training: true`."
            )
    return None
