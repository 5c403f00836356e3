"""Linear layers that multiply in float8: torchao's arithmetic, emulated without a GPU for it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from train.data.chat.template import use_template
from train.data.prepare import prepare
from train.data.prepared_data import PreparedData
from train.errors import UserError
from train.loop.arguments import training_arguments
from train.loop.checkpoint.resume import find_checkpoint
from train.loop.guards.packing_isolation import measure_isolation
from train.loop.metrics_log import StepLog
from train.loop.trainer import JanusTrainer
from train.model.float8 import (
    LossDifference,
    convert,
    find_linear_layers,
    gpu_objection,
    measure_loss_difference,
    without_float8,
)
from train.model.load import load_model
from train.model.tokenizer import load_tokenizer
from train.preflight.start_screen import start_screen
from train.recipe import Recipe, load_recipe
from train.sft import main

torchao = pytest.importorskip("torchao.float8", reason="the package torchao is not installed (make test installs it)")

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
CPU = torch.device("cpu")
ROW = torch.randint(0, 280, (77,), generator=torch.Generator().manual_seed(3)).tolist()


def llama(**settings: int | bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes | {"num_attention_heads": 4, "initializer_range": 0.1} | settings))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    """Return the mean loss of ROW, computed by transformers from labels."""
    ids = torch.tensor([ROW])
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def rounding(values: torch.Tensor, mantissa: int, smallest: float, largest: float) -> torch.Tensor:
    """Bounds of the float8 rounding error of each of `values`, with one scale for all.

    Half the distance of two numbers: 2**-(mantissa + 1) of a normal number, a step of the subnormal ones below. Scales
    that are rounded down to a power of 2 leave half of the range unused.
    """
    subnormal = smallest * 2.0**-mantissa / 2 * 2 * values.abs().max() / largest
    return values.abs() * 2.0 ** -(mantissa + 1) + subnormal


def e4m3(values: torch.Tensor) -> torch.Tensor:
    return rounding(values, 3, 2.0**-6, 448.0)


def e5m2(values: torch.Tensor) -> torch.Tensor:
    return rounding(values, 2, 2.0**-14, 57344.0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_product_is_off_by_no_more_than_its_factors_are_rounded(name: str) -> None:
    """Forward and both gradients of a layer against float64, by element; the tokens are no multiple of 16."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 48, bias=bias) for bias in (False, True)))
    model.get_output_embeddings = lambda: None
    first, layer = model
    second = torch.nn.Linear(64, 48)
    stack = torch.nn.ModuleDict({"first": first, "between": layer, "last": second})
    stack.get_output_embeddings = lambda: None
    convert(stack, name, emulate=True)
    float8 = stack["between"]
    inputs = torch.randn(37, 64, requires_grad=True)
    output = float8(inputs)
    upstream = torch.randn(37, 48) * 10.0 ** torch.randint(-3, 1, (37, 1))  # tokens whose gradients differ in size
    output.backward(upstream)

    factors = [weight.detach().double() for weight in (inputs, float8.weight, upstream)]
    ours, weight, above = factors
    of_above = e5m2(above) if name == "tensorwise" else e4m3(above)

    def furthest(a: torch.Tensor, da: torch.Tensor, b: torch.Tensor, db: torch.Tensor) -> torch.Tensor:
        return (da @ b.abs() + a.abs() @ db + da @ db) * (1 + 1e-5) + 1e-5  # and float32's own rounding

    checked = [
        (output - float8.bias, ours @ weight.T, furthest(ours, e4m3(ours), weight.T, e4m3(weight).T)),
        (inputs.grad, above @ weight, furthest(above, of_above, weight, e4m3(weight))),
        (float8.weight.grad, above.T @ ours, furthest(above.T, of_above.T, ours, e4m3(ours))),
    ]
    for place, (result, exact, bound) in enumerate(checked):
        error = (result.detach().double() - exact).abs()
        assert (error <= bound).all(), place
        share = (error.norm() / exact.norm()).item()
        if place == 2 and name == "rowwise_with_gw_hp":
            assert share < 1e-6
        else:
            assert share > 0.01, "nothing was rounded"


def test_converted_layers() -> None:
    """All except the first and the output layer, and those whose sizes aren't multiples of 16."""
    model = llama(intermediate_size=120)
    convert(model, "rowwise", emulate=True)
    layers = find_linear_layers(model)
    attention = [f"model.layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "qkvo"]
    perceptron = [f"model.layers.{n}.mlp.{part}_proj" for n in (0, 1) for part in ("gate", "up", "down")]
    assert layers.converted == attention[1:]
    assert sorted(layers.others) == sorted([attention[0], *perceptron, "lm_head"])
    assert str(layers).startswith("7 of 15 linear layers; not converted: model.layers.0.self_attn.q_proj, ")
    assert str(layers).endswith(" and 5 more")


def test_a_model_without_a_layer_for_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.float8: none of the model's 8 linear layers .*multiples of 16"):
        convert(llama(hidden_size=40, intermediate_size=72, num_hidden_layers=1), "rowwise", emulate=True)


@pytest.mark.parametrize("name", RECIPES)
def test_the_measured_losses_are_the_models(name: str) -> None:
    """With float8 it is that of the converted model, without it bitwise that of the model before conversion."""
    model = llama()
    model.train()
    before = loss_of(model).item()
    convert(model, name, emulate=True)
    after = loss_of(model).item()
    difference = measure_loss_difference(model, ROW, CPU, bf16=False)
    assert after != before
    assert (difference.float8, difference.plain) == (pytest.approx(after, rel=1e-6), pytest.approx(before, rel=1e-6))
    assert difference.tokens == len(ROW) - 1
    assert str(difference) == f"the loss of a row (76 tokens) is {after:.4f}, {before:.4f} without it"
    assert model.training
    assert all(module.training for module in model.modules())
    assert loss_of(model).item() == after
    with without_float8(model):
        assert loss_of(model).item() == before
        assert not find_linear_layers(model).converted


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_of_a_model_keep_their_direction(name: str) -> None:
    """The rounding errors of 13 layers are independent, so their squares add up."""
    plain, float8 = llama(), llama()
    convert(float8, name, emulate=True)
    assert len(find_linear_layers(float8).converted) == 13
    for model in plain, float8:
        loss_of(model).backward()
    exact, rounded = (torch.cat([weight.grad.flatten() for weight in model.parameters()]) for model in (plain, float8))
    of_a_product = (2 * 0.026**2) ** 0.5  # both factors; root mean square of e4m3's rounding
    backward = (0.026**2 + (0.053 if name == "tensorwise" else 0.026) ** 2) ** 0.5  # e5m2 has a bit less
    expected = (13 * of_a_product**2 + 13 * backward**2) ** 0.5
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 0.01 < error < expected


@pytest.mark.parametrize("name", RECIPES)
def test_weights_that_float8_cannot_hold_stop_the_run(name: str) -> None:
    """A huge weight of an input that is always 0 changes only the scale of the other weights."""
    model = llama()
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[0] = layer.post_attention_layernorm.weight.data[0] = 0.0
        layer.input_layernorm.weight.requires_grad_(False)
        layer.post_attention_layernorm.weight.requires_grad_(False)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    for _ in range(60):  # until it knows the row: a model of random weights has the same loss with any others
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model) < 0.1
    convert(model, name, emulate=True)
    assert measure_loss_difference(model, ROW, CPU, bf16=False).float8 < 0.2
    for layer in model.model.layers:
        attention, perceptron = layer.self_attn, layer.mlp
        for linear in attention.q_proj, attention.k_proj, attention.v_proj, perceptron.gate_proj, perceptron.up_proj:
            linear.weight.data[:, 0] = 1e9
    message = r"^model\.float8: the loss of a row \(76 tokens\) is [\d.]+ with it, 0\.\d+ without it: .*null\.$"
    with pytest.raises(UserError, match=message):
        measure_loss_difference(model, ROW, CPU, bf16=False)


@pytest.mark.parametrize(
    ("float8", "plain", "standard_error", "fine"),
    [
        (2.12, 2.0, 0.0, True),
        (2.13, 2.0, 0.0, False),  # a sixteenth is 0.125
        (1.87, 2.0, 0.0, False),
        (2.13, 2.0, 0.01, True),
        (0.07, 0.01, 0.0, True),
        (0.08, 0.01, 0.0, False),
        (float("nan"), 2.0, float("nan"), False),
        (float("inf"), 2.0, float("nan"), False),
        (float("nan"), float("nan"), float("nan"), True),  # not float8's doing
    ],
)
def test_the_allowed_error_of_the_loss(float8: float, plain: float, standard_error: float, fine: bool) -> None:
    error = LossDifference(float8, plain, standard_error, 100).error()
    assert (error is None) == fine
    assert fine or f"is {float8:.4f} with it, 2.0000 without" in error or plain < 1
    assert fine or ("explains nan" not in error)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {}, "quantization": {}}, "4-bit weights have their own kernels"),
        ({"adapter": {"use_dora": True}}, "DoRA multiplies by the weights outside of the layer"),
        ({"training": {"bf16": False, "fp16": True}}, "float8 needs bfloat16 around it"),
        ({"training": {"bf16": False}}, "float8 needs bfloat16 around it"),
    ],
)
def test_settings_that_exclude_float8(recipe_file: Callable[..., Path], sections: dict, message: str) -> None:
    sections = {"training": {"bf16": True}, **sections}
    with pytest.raises(UserError, match=f"model.float8: {message}.*null"):
        load_recipe(recipe_file(model={"float8": "rowwise"}, **sections))


def test_settings_that_work_with_float8(recipe_file: Callable[..., Path]) -> None:
    for sections in {"model": {"dtype": "bfloat16"}, "training": {"bf16": False}}, {"training": {"bf16": True}}:
        sections["model"] = {"float8": "tensorwise", **sections.get("model", {})}
        assert load_recipe(recipe_file(**sections, adapter={"r": 2})).model.float8 == "tensorwise"
    assert load_recipe(recipe_file()).model.float8 is None


def float8_recipe(recipe_file: Callable[..., Path], name: str = "rowwise", **sections: dict) -> Path:
    # In weights of bfloat16: Float8Linear heeds CUDA's autocast alone, so on a CPU float32 would meet bfloat16.
    training = {"bf16": True, **sections.pop("training", {})}
    model = {"float8": name, "dtype": "bfloat16", "allow_16bit_training": True}
    return recipe_file(model=model, training=training, **sections)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_a_check_warns_and_a_run_ends(
    recipe_file: Callable[..., Path], refused: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = float8_recipe(recipe_file)
    assert main(["--recipe", str(path), "--check"]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "bfloat16, float8 rowwise template " in shown  # and nothing more of it
    assert "compute capability 8.9 or later (Ada, Hopper, Blackwell), and this machine has no GPU" in shown
    assert "without `training.torch_compile: true`" in shown
    assert refused("--recipe", path).endswith("this machine has none. Write null, or train on another machine.")
    assert not (tmp_path / "run").exists(), "said before any work"
    main(["--recipe", str(path), "--check", "training.torch_compile=true"])
    assert "torch_compile" not in capsys.readouterr().out


def test_gpus_with_float8() -> None:
    for capability in (8, 9), (9, 0), (10, 0), (12, 0):
        assert gpu_objection(capability, "a GPU") is None
    assert "this one, NVIDIA A100-SXM4-80GB, has 8.0" in gpu_objection((8, 0), "NVIDIA A100-SXM4-80GB")


def test_without_torchao(
    recipe_file: Callable[..., Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    message = refused("--recipe", float8_recipe(recipe_file), "--check")
    assert message.startswith("model.float8: it needs the package torchao, which is not installed")


def emulated(recipe: Recipe) -> tuple[JanusTrainer, PreparedData]:
    """Return the trainer of a recipe in float8, emulated."""
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, recipe.chat.template)
    data = prepare(recipe, tokenizer)
    Path(recipe.output_dir).mkdir(exist_ok=True)
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"float8": None})})
    model = load_model(plain)
    convert(model, recipe.model.float8, emulate=True)
    callbacks = [StepLog(recipe.output_dir)]
    return JanusTrainer(recipe, training_arguments(recipe), model, tokenizer, data, callbacks), data


def losses_in(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_shown_saved_as_a_plain_model_and_resumed(
    recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path, name: str
) -> None:
    steps = {"max_steps": 6, "num_train_epochs": ..., "save_strategy": "steps", "save_steps": 3}
    recipe = load_recipe(float8_recipe(recipe_file, name, training=steps))
    trainer, data = emulated(recipe)
    shown = start_screen(recipe, "chatml", data, trainer.model, trainer.args, width=10_000).splitlines()
    place = next(number for number, line in enumerate(shown) if line.startswith("float8 "))
    first = "model.layers.0.self_attn.q_proj"
    assert shown[place] == f"float8      {name}: 13 of 15 linear layers; not converted: {first}, lm_head"
    assert " tokens) is " in shown[place + 1]
    assert shown[place + 1].endswith(" without it")
    trainer.train()
    folder = tmp_path / "run"
    trainer.save_model(str(folder))

    plain = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    assert {n: (p.shape, p.dtype) for n, p in plain.state_dict().items()} == {
        n: (p.shape, p.dtype) for n, p in start.state_dict().items()
    }
    assert "float8" not in (folder / "config.json").read_text().lower()
    assert {type(module).__name__ for module in plain.modules()} == {
        type(module).__name__ for module in start.modules()
    }
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in trainer.model.state_dict().items())
    moved = (plain.model.layers[1].mlp.up_proj.weight - start.model.layers[1].mlp.up_proj.weight).abs().max()
    assert moved > 1e-4

    uninterrupted = losses_in(folder)
    assert len(uninterrupted) == 6
    (folder / "metrics.jsonl").unlink()
    trainer, _ = emulated(recipe)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert find_checkpoint("auto", recipe).folder == folder / "checkpoint-6"
    assert losses_in(folder)[-3:] == uninterrupted[3:]


def test_an_adapter_on_float8_layers(recipe_file: Callable[..., Path], tiny_model: Path) -> None:
    from peft import PeftModel

    recipe = load_recipe(float8_recipe(recipe_file, adapter={"r": 4}))
    trainer, _ = emulated(recipe)
    layers = find_linear_layers(trainer.model)
    assert (len(layers.converted), layers.others) == (13, ["model.layers.0.self_attn.q_proj", "lm_head"])
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters() if not weight.requires_grad}
    difference = measure_loss_difference(trainer.model, ROW, CPU, bf16=False)
    assert difference.float8 != difference.plain
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters() if name in before)
    trained = [weight for name, weight in trainer.model.named_parameters() if "lora_B" in name]  # they begin as 0
    assert len(trained) == 14
    assert all(weight.count_nonzero() for weight in trained)
    trainer.save_model(recipe.output_dir)
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(start, recipe.output_dir)
    names = [name for name in trainer.model.state_dict() if "lora_" in name]
    assert len(names) == 28
    assert all(torch.equal(loaded.state_dict()[name], trainer.model.state_dict()[name]) for name in names)


def test_the_isolation_test_ignores_shared_scales(recipe_file: Callable[..., Path]) -> None:
    """A scale per tensor couples packed documents; a leak of the masks is measured without float8."""
    trainer, _ = emulated(load_recipe(float8_recipe(recipe_file, "tensorwise")))
    trainer.model_wrapped = trainer.model
    isolation = measure_isolation(trainer)
    assert (isolation.change, isolation.noise) == (0.0, 0.0)
    assert isolation.find_error() is None


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or gpu_objection(torch.cuda.get_device_capability()) is not None,
    reason="needs a CUDA device with float8",
)
@pytest.mark.parametrize("name", RECIPES)
def test_on_a_gpu(recipe_file: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Kernels give the results of emulation, wherever the weights are; runs end with the loss of bfloat16."""
    device = torch.device("cuda", 0)
    emulation = llama().to(device, torch.bfloat16)
    convert(emulation, name, emulate=True)
    expected = measure_loss_difference(emulation, ROW, device, bf16=False)
    model = llama().to(torch.bfloat16)
    convert(model, name)
    from_host = measure_loss_difference(model, ROW, device, bf16=False)
    assert all(parameter.device == CPU for parameter in model.parameters())
    on_device = measure_loss_difference(model.to(device), ROW, device, bf16=False)
    assert dataclasses.astuple(from_host) == dataclasses.astuple(on_device)
    assert from_host.plain == pytest.approx(expected.plain, rel=1e-3)
    assert from_host.float8 == pytest.approx(expected.float8, rel=2**-6)  # sums in another order, in bfloat16

    losses = {}
    for run, settings in {
        "bfloat16": {"model": {}},
        "float8": {"model": {"float8": name}},
        "compiled": {"model": {"float8": name}, "training": {"torch_compile": True}},
    }.items():
        settings["model"] |= {"dtype": "bfloat16", "allow_16bit_training": True}
        training = {"bf16": True, **settings.pop("training", {})}
        path = recipe_file(**settings, training=training, output_dir=str(tmp_path / run))
        assert main(["--recipe", str(path)]) == 0
        losses[run] = losses_in(tmp_path / run)
    for run in "float8", "compiled":
        assert losses[run] == pytest.approx(losses["bfloat16"], rel=2**-4)
        assert losses[run] != losses["bfloat16"]
