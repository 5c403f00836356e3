"""What a run is about to do, on one screen, before the first step."""

from transformers import PreTrainedModel
from trl import SFTConfig

from train.data.prepare import Account, Prepared
from train.loop.trainer import optimizer_steps, sequences_per_step
from train.recipe import Recipe


def screen(recipe: Recipe, template: str, data: Prepared, model: PreTrainedModel, arguments: SFTConfig) -> str:
    """Model, data, batches and what is trained, as lines of plain text. `template`: which one, in words."""
    trained, total = _parameters(model)
    kind = "full fine-tuning" if recipe.adapter is None else f"LoRA r={recipe.adapter.r}"
    if recipe.quantization is not None:
        kind += f" on 4-bit {recipe.quantization.bnb_4bit_quant_type}"
    steps = optimizer_steps(data.train.rows, arguments)
    lines = [
        ("model", f"{recipe.model.name_or_path}, {recipe.model.dtype}, attention {model.config._attn_implementation}"),
        ("training", f"{kind}: {trained:,} of {total:,} parameters ({trained / total:.2%})"),
        ("template", template),
        *_describe("data", data.train.account, recipe),
        *(_describe("validation", data.validation.account, recipe) if data.validation else []),
        (
            "steps",
            f"{steps:,} of {sequences_per_step(arguments)} rows, about "
            f"{data.train.account.tokens_per_sequence * sequences_per_step(arguments):,.0f} tokens; "
            f"{arguments.world_size} process{'es' if arguments.world_size > 1 else ''}",
        ),
        ("output", recipe.output_dir),
    ]
    return "\n".join(f"{name:<11} {value}" for name, value in lines)


def _describe(name: str, account: Account, recipe: Recipe) -> list[tuple[str, str]]:
    share = account.trained_tokens / max(account.tokens, 1)
    lines = [(name, f"{account.rows:,} rows, {account.tokens:,} tokens, {share:.1%} of them trained")]
    if recipe.data.packing:
        filling = account.tokens / max(account.sequences * recipe.data.max_length, 1)
        lines.append(
            ("", f"packed into {account.sequences:,} sequences of {recipe.data.max_length:,}, {filling:.1%} full")
        )
    if account.overlong_rows:
        did = {"drop": "dropped", "truncate": "cut"}[recipe.data.overlong]
        lines.append(
            (
                "",
                f"{account.overlong_rows:,} rows over {recipe.data.max_length:,} tokens {did}: "
                f"{account.overlong_tokens:,} tokens lost",
            )
        )
    lines += [
        ("", f"{rows.count:,} rows left out, {kind}: first {rows.examples[0]}") for kind, rows in account.faults.items()
    ]
    return lines


def _parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters trained and in all; quantized ones count for what they stand for, ZeRO-3's with their whole size."""
    trained = total = 0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.__class__.__name__ == "Params4bit":
            size = parameter.quant_state.shape.numel() if parameter.quant_state else size
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total
