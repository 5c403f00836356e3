"""Compilation of a model's layers by training.torch_compile."""

from accelerate.utils import TorchDynamoPlugin
from trl import SFTConfig


def compile_layers(plugin: TorchDynamoPlugin) -> None:
    """Compile the layers one by one, which share their code, and let sizes vary.

    - accelerate's `use_regional_compilation` compiles three to four times faster than the complete model, without a
      graph break.
    - `accelerate launch` sets ACCELERATE_DYNAMO_USE_DYNAMIC=False, under which each pack of another size is compiled
      anew, until torch gives up after eight and runs eagerly. None, torch's own default, compiles twice.
    """
    plugin.use_regional_compilation, plugin.dynamic = True, None


def compile_warnings(arguments: SFTConfig) -> list[str]:
    """Return a warning about a configuration under which training.torch_compile gains little."""
    plugin = arguments.deepspeed_plugin
    if not arguments.torch_compile or plugin is None or not plugin.hf_ds_config.is_zero3():
        return []
    return [
        "training.torch_compile: under ZeRO-3 a hook of DeepSpeed's at each module ends the graph, so little is "
        "compiled. Launch with accelerate_configs/fsdp2.yaml, or with zero1.yaml or zero2.yaml if the model fits."
    ]
