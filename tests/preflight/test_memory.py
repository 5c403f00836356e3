"""Bytes and FLOPs of the plan against PyTorch's own: optimizers' states, counted FLOPs."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from train.model.architecture import Architecture, inspect_architecture
from train.model.flops import count_training_flops
from train.preflight.plan.memory import DDP, STRATEGIES, StateSettings, count_state_bytes
from train.preflight.plan.optimizer_states import Tensor, state_bytes
from train.recipe import AdapterSection, QuantizationSection, load_recipe

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}


def shape(config: PreTrainedConfig, dtype: str = "bfloat16", **sections: Any) -> Architecture:
    model = SimpleNamespace(name_or_path="x", dtype=dtype, trust_remote_code=False)
    return inspect_architecture(
        SimpleNamespace(model=model, **{"adapter": None, "quantization": None} | sections), config
    )  # type: ignore[arg-type]


OPTIMIZERS = [
    "adamw_torch",
    "adafactor",
    "adamw_bnb_8bit",
    "lion_8bit",
    "paged_adamw_32bit",
    "sgd",
    "adagrad",
    "rmsprop",
]


@pytest.mark.parametrize(("name", "dtype"), product(OPTIMIZERS, [torch.float32, torch.bfloat16]))
def test_state_bytes_are_those_of_the_optimizer(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.optim import GlobalOptimManager
    from transformers import Trainer, TrainingArguments

    # bitsandbytes keeps, for the process, which parameters of earlier models had states of 32 bits, by their numbers
    monkeypatch.setattr(GlobalOptimManager, "_instance", None)
    shapes = [(96, 70), (7, 5), (70,), (5_000,), (3, 4, 5)]
    module = torch.nn.Module()
    for number, size in enumerate(shapes):
        module.register_parameter(f"one{number}", torch.nn.Parameter(torch.ones(size, dtype=dtype)))
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to=[])
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, module)
    optimizer = kind(module.parameters(), **settings)
    for tensor in module.parameters():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    tables = {"qmap1", "qmap2"}  # one table for all tensors
    expected = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key not in tables
    )
    assert state_bytes(name, [Tensor(size, dtype.itemsize) for size in shapes]) == expected


def test_flops_of_matrices_are_those_that_torch_counts() -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=2)
    model, tokens = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager"), 40
    with FlopCounterMode(display=False) as counter:
        ids = torch.zeros(1, tokens, dtype=torch.long)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = counter.get_flop_counts()["Global"]
    matrices, attention = counted[torch.ops.aten.mm], counted[torch.ops.aten.bmm]
    flops = count_training_flops(shape(config), np.array([tokens]))
    norms = 5 * 64  # no matrices, but parameters of the convention
    assert flops.parameters == pytest.approx(matrices + 6 * norms * tokens, rel=0.001)
    # eager attention computes every pair: n^2 in place of n(n+1)/2; and rotary angles are a product of 1 x 8 x 40
    assert flops.attention * 2 * tokens / (tokens + 1) == pytest.approx(attention, rel=0.01)


def test_attention_stays_inside_documents_and_windows() -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=2)
    lengths = np.array([1, 5, 17])
    pairs = sum(1 for length in lengths for query in range(length) for key in range(length) if key <= query)
    assert count_training_flops(shape(config), lengths).attention == 2 * 12 * 64 * pairs
    from transformers import Gemma2Config

    gemma = Gemma2Config(**SIZES, num_key_value_heads=2, sliding_window=4)
    near = sum(1 for length in lengths for query in range(length) for key in range(length) if 0 <= query - key < 4)
    assert count_training_flops(shape(gemma), lengths).attention == 12 * 64 * (pairs + near)


def test_frozen_weights_take_two_thirds() -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=4)
    full, lora = shape(config), shape(config, adapter=AdapterSection(r=4, target_modules=("q_proj",)))
    adapters = 2 * 4 * (64 + 64)
    assert lora.trained == adapters
    matrices = full.total - 128 * 64
    assert count_training_flops(lora, np.array([10])).parameters == 10 * (4 * matrices + 6 * adapters)


def test_ddp_keeps_weights_gradients_and_states_in_the_dtype_of_the_recipe() -> None:
    """In pure bfloat16: 2 + 2 + 2 + 2 bytes a parameter, in float32 4 + 4 + 4 + 4; DDP's buckets are added."""
    config = LlamaConfig(**SIZES, num_key_value_heads=4)
    for dtype, size in ("bfloat16", 2), ("float32", 4):
        architecture = shape(config, dtype)
        states = count_state_bytes(architecture, DDP, StateSettings(2, "adamw_torch", True))
        assert (states.parameters, states.gradients, states.communication) == (architecture.total * size,) * 3
        assert states.optimizer == 2 * architecture.total * size + 4 * len(architecture.parameters)
        assert count_state_bytes(architecture, DDP, StateSettings(1, "adamw_torch", True)).communication == 0


def test_eighteen_bytes_a_parameter_shrink_as_in_the_zero_paper() -> None:
    """ZeRO, figure 1: 7.5B parameters on 64 GPUs take 31.4, 16.6 and 1.9 GB, with gradients in 2 bytes; here in 4."""
    config = LlamaConfig(hidden_size=4_096, intermediate_size=14_336, num_hidden_layers=33, num_key_value_heads=8)
    architecture = shape(config)
    scale = 7.5e9 / architecture.total
    more = 7.5 * 2
    paper = (31.4 + more, 16.6 + more / 64, 1.9 + more / 64)
    for strategy, gigabytes in zip(STRATEGIES[1:4], paper, strict=True):
        states = count_state_bytes(architecture, strategy, StateSettings(64, "adamw_torch", True))
        total = (states.parameters + states.gradients + states.optimizer) * scale / 1e9
        assert total == pytest.approx(gigabytes, rel=0.02)


def test_four_bit_weights_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.functional import quantize_4bit

    config = LlamaConfig(**SIZES, num_key_value_heads=4)
    architecture = shape(config, adapter=AdapterSection(r=4), quantization=QuantizationSection())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    expected = 0
    for name, tensor in model.named_parameters():
        if name.endswith("proj.weight"):
            packed, state = quantize_4bit(
                tensor.data, quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16
            )
            expected += packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        else:
            expected += tensor.nbytes
    adapters = 2 * sum(tensor.elements for tensor in architecture.parameters if tensor.trained)
    assert count_state_bytes(architecture, DDP, StateSettings(1, "adamw_torch", True)).parameters == expected + adapters


def test_stage_3_pads_each_parameter_and_keeps_small_ones_complete() -> None:
    architecture = shape(
        LlamaConfig(
            **SIZES | {"hidden_size": 60, "head_dim": 14, "vocab_size": 127, "intermediate_size": 175},
            num_key_value_heads=2,
        )
    )
    states = count_state_bytes(architecture, STRATEGIES[3], StateSettings(8, "adamw_torch", True))
    shares = [-(-tensor.elements // 8) for tensor in architecture.parameters]
    small = [share * 8 for share, tensor in zip(shares, architecture.parameters, strict=True) if tensor.elements <= 600]
    assert states.parameters == 2 * (sum(shares) + sum(small))
    assert states.gradients == 4 * sum(shares)
    assert states.optimizer == 12 * sum(shares) + 2 * 4  # a step count for each of the two groups


def test_inspecting_a_model_does_not_change_its_config(tiny_model: Path, recipe_file: Callable[..., Path]) -> None:
    """transformers writes the attention kernel of a model into the config that it is built from."""
    config = AutoConfig.from_pretrained(tiny_model, attn_implementation="sdpa")
    inspect_architecture(load_recipe(recipe_file()), config)
    assert config._attn_implementation == "sdpa"


def test_stage_1_in_float16_is_not_that_of_bfloat16() -> None:
    """By hand: float32 sums of all gradients and a copy of the share beside them; three buckets in float32."""
    model, gpus = shape(LlamaConfig(**SIZES)), 4
    half, single = (
        count_state_bytes(model, STRATEGIES[1], StateSettings(gpus, "adamw_torch_fused", True, float16=float16))
        for float16 in (True, False)
    )
    assert model.total % (2 * gpus) == 0
    assert half.gradients == 4 * model.total + 4 * model.total // gpus
    assert single.gradients == 4 * model.total
    largest = max(parameter.elements for parameter in model.parameters)
    assert half.communication == 3 * 200_000_000 * 4 + 2 * largest
    assert (half.parameters, half.optimizer) == (single.parameters, single.optimizer)
