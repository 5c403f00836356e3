"""What DeepSpeed's and FSDP's settings must say for a recipe to be trained as it stands and saved whole."""

import os

from trl import SFTConfig

from train.errors import UserError
from train.recipe import Recipe


def check_sharding(recipe: Recipe, arguments: SFTConfig) -> None:
    """Raise UserError for settings under which a save would hold no model, or a key of the recipe would do nothing."""
    plugin = arguments.deepspeed_plugin
    deepspeed = plugin and plugin.hf_ds_config
    if deepspeed is not None and deepspeed.is_zero3():
        key = "stage3_gather_16bit_weights_on_model_save"
        if not deepspeed.get_value(f"zero_optimization.{key}"):
            raise UserError(
                f"the DeepSpeed configuration leaves out `zero_optimization.{key}: true`, so a save would hold no "
                "model, only DeepSpeed's own pieces. Add it, or launch with accelerate_configs/zero3.yaml."
            )
        selective = (arguments.gradient_checkpointing_kwargs or {}).get("selective")
        if recipe.adapter is not None and arguments.gradient_checkpointing and selective:
            raise UserError(
                "training.gradient_checkpointing_kwargs: `selective: true` needs checkpoints that aren't reentrant, "
                "and an adapter under ZeRO-3 needs those that are. Leave selective out, or launch with "
                "accelerate_configs/zero2.yaml."
            )
    if deepspeed is not None and deepspeed.get_value("optimizer.type"):
        wanted, used = recipe.training.get("optim"), deepspeed.get_value("optimizer.type")
        if wanted is not None and not wanted.startswith("adamw_torch"):
            raise UserError(
                f"training.optim: {wanted} would not be used: the DeepSpeed configuration names its own optimizer, "
                f"{used}. Write adamw_torch, or launch with a configuration that leaves the optimizer to the recipe."
            )
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and "FULL_STATE_DICT" not in os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"):
        raise UserError(
            f"fsdp_state_dict_type: {os.environ['FSDP_STATE_DICT_TYPE']} saves no model, only FSDP's own pieces. Write "
            "FULL_STATE_DICT, or launch with accelerate_configs/fsdp2.yaml."
        )
    if recipe.quantization and (fsdp or (deepspeed is not None and deepspeed.is_zero3())):
        _check_storage(recipe)


def _check_storage(recipe: Recipe) -> None:
    """4-bit weights are split over ranks by the type that they are stored as (peft#1550, #2016)."""
    assert recipe.quantization is not None
    storage, dtype = recipe.quantization.bnb_4bit_quant_storage, recipe.model.dtype
    if dtype not in (storage, "auto"):
        raise UserError(
            f"quantization.bnb_4bit_quant_storage: {storage} differs from model.dtype: {dtype}. ZeRO-3 and FSDP split "
            f"weights of one type alone. Write the same type for both, and for bnb_4bit_compute_dtype."
        )
