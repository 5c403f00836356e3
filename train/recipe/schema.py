"""What a run is: a YAML file, strict and documented key by key.

    python -m train.recipe --schema > recipes/schema.json     the JSON Schema that editors complete from

Nothing heavy is imported here, so whatever is wrong with a recipe is known within a second, all of it in one report.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag

from train.recipe.sft_config import training_fields
from train.recipe.validation import validate
from train.recipe.yaml_document import Document, RecipeDumper
from train.storage.local_paths import LocalPath


class Section(BaseModel):
    """A part of a recipe: strict, and its attributes' docstrings are its manual."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _shape(value: object) -> str:
    """Which branch of `one value | a list` is meant, so that an error speaks of that branch alone."""
    return "<list>" if isinstance(value, list | tuple) else "<single>"


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, LocalPath()]
Texts = Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]  # YAML has lists; a tuple stays as it is


class ModelSection(Section):
    """The model that training starts from."""

    name_or_path: PathText
    """A folder with a model, or its id on the Hugging Face hub."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null = its main branch."""
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    """Type of the weights as loaded; auto = as saved. With full fine-tuning on one process AdamW in pure bfloat16 loses
    small updates; float32 with `training.bf16` keeps master weights."""
    attention: Literal[
        "auto",
        "flash_attention_4",
        "flash_attention_3",
        "flash_attention_2",
        "torch_varlen",
        "flex_attention",
        "sdpa",
        "eager",
    ] = "auto"
    """Attention kernel; auto = the fastest one found here that can do what this model needs and keeps packed documents
    apart: the start screen says which, and why no faster one. torch_varlen = FlashAttention with the kernels that torch
    ships; flash_attention_N need the packages flash-attn-4, flash-attn-3 (built from source) or flash-attn; sdpa and
    eager mask what other documents hold, and compute it all the same."""
    float8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Multiply in float8, by one of torchao's recipes; null = in the weights' type. All but the first and the last
    linear layer do, where their sizes are multiples of 16; weights, gradients and what is saved stay as they are. Needs
    the package torchao, computing in bfloat16, a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), and
    `training.torch_compile: true` to be faster at all. tensorwise = one scale for a tensor, the fastest, so that
    packed documents share scales; rowwise = one for each token: more exact; rowwise_with_gw_hp = gradients of the
    weights in bfloat16 too: the most exact. Not with `quantization` or DoRA. The start screen shows what it does to the
    loss."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Read that code first."""
    allow_pickle: bool = False
    """Open weights in pickle files, which can run code as they are opened, where there are no safetensors."""


class ChatSection(Section):
    """How a conversation becomes text, and which part of it is trained."""

    template: PathText | None = None
    """A name in train/data/templates, the path of a .jinja file, the name of one of several templates that the
    tokenizer has (tool_use), or null = the tokenizer's own, of several the one called default."""
    system_role: Literal["native", "merge_into_user", "turn", "error"] = "native"
    """What becomes of system messages; native = the template has a place for them, and is refused if it loses them;
    merge_into_user = into the user turn that follows; turn = where the template has none, a turn made like the user's
    (as SYSGEN did for Gemma-2); error = a row with one is refused. The saved tokenizer's template does the same."""
    default_system: str | None = None
    """System message of conversations that don't begin with one, written into the saved template too; null = none of
    ours, so a default that the template itself adds stays; "" = that one is taken out."""
    control_tokens_in_text: Literal["error", "escape", "allow"] = "error"
    """What becomes of control tokens (<|im_end|>) typed in a message, which would end turns and open others; error =
    the row is refused; escape = an invisible character breaks them up; allow = they stay control tokens."""
    train_on: Literal["assistant", "last"] = "assistant"
    """Train every assistant turn, or the last one of each conversation. Its end token is always trained with it."""


class Source(Section):
    """One place that rows come from."""

    path: PathText
    """A data set's id on the hub, a file, a folder or a glob."""
    name: Text | None = None
    """Configuration of a data set on the hub that has several."""
    split: Text = "train"
    """Split of a data set that has several."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null = its main branch."""
    weight: float = Field(default=1.0, gt=0)
    """How often a row is seen in an epoch: 1.0 = once, 0.5 = a seeded half of the rows, 2.0 = every row twice."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "janus", "prompt_completion", "question_answer", "exchanges"
    ] = "auto"
    """How a row is to be read; auto = recognised from the columns."""
    ignore: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Columns (`rationale`) and keys of messages (`messages[].note`) that hold content and are to be left out: rows are
    read as if they had none of them. Without it, content that nothing reads is an error."""


Sources = Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]


class DataSection(Section):
    """The rows that are trained, and how they are cut and packed."""

    sources: Sources
    """Where the rows come from: at least one source."""
    validation: (
        Annotated[
            Annotated[float, Field(gt=0, lt=1), Tag("<single>")] | Annotated[Sources, Tag("<list>")],
            Discriminator(_shape),
        ]
        | None
    ) = None
    """Rows held out for evaluation: a share of the sources, or sources of their own; null = none."""
    max_length: int = Field(ge=8)
    """Most tokens in one row, or in one packed sequence. There is no default: longer rows are dropped or cut, and a
    default (TRL's is 1,024) does that unnoticed. See how long your rows are, then choose."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What becomes of a row of more than `max_length` tokens; what is dropped or cut is counted and printed."""
    packing: bool = True
    """Put several rows into one sequence of `max_length`; attention keeps them apart."""
    repack: bool = True
    """Put other rows together in each epoch, as shuffling rows would; the number of sequences stays the same."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What becomes of a row that can't be trained (no assistant turn, unknown role, ...); each kind is counted."""
    allow_pickle: bool = False
    """Open data in pickle files, which can run code as they are opened."""
    cache_dir: PathText | None = None
    """Folder where tokens are kept for the next start; null = janus-sft in HF_HOME (~/.cache/huggingface)."""
    processes: int | None = Field(default=None, ge=1)
    """Processes that tokenize; null = one for each core that the job may use."""


class AdapterSection(Section):
    """LoRA, by the names of peft's LoraConfig."""

    r: int = Field(default=16, gt=0)
    """Rank of the update matrices."""
    lora_alpha: float = Field(default=32, gt=0)
    """The update is scaled by lora_alpha / r (with rsLoRA by lora_alpha / sqrt(r))."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: Annotated[
        Annotated[Literal["all-linear"], Tag("<single>")] | Annotated[Texts, Tag("<list>")], Discriminator(_shape)
    ] = "all-linear"
    """Modules that get an adapter: all-linear = every linear layer but the output, or a list of module names."""
    use_dora: bool = False
    """Weight-decomposed LoRA (DoRA): slower, better at small ranks."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: scale by lora_alpha / sqrt(r)."""
    modules_to_save: Texts | None = None
    """Modules that are trained in full and saved with the adapter."""


class QuantizationSection(Section):
    """The frozen weights in 4 bits (QLoRA), by the names of transformers' BitsAndBytesConfig. Needs `adapter`."""

    load_in_4bit: Literal[True] = True
    """The one form there is; for weights that are not quantized take the section out."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """nf4 suits weights that are spread normally, as those of trained models are."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the scales too: 0.4 bits less a weight."""
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type that weights are unpacked to for computing."""
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "bfloat16"
    """Type the packed weights are stored as: that of the other weights, so that FSDP and ZeRO-3 can split them."""


class WandbSection(Section):
    """A run on Weights & Biases. The key comes from the environment (WANDB_API_KEY), never from a recipe."""

    project: Text = "janus-sft"
    """Project of the run."""
    entity: Text | None = None
    """Team or user; null = the account's own."""
    name: Text | None = None
    """Name of the run; null = one that wandb makes up."""
    group: Text | None = None
    """Group of runs that this one belongs to."""
    tags: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Tags of the run."""
    mode: Literal["online", "offline"] = "online"
    """offline = write to output_dir alone; it needs no account, `wandb sync` sends it later."""


class TrackingSection(Section):
    """Where figures go besides metrics.jsonl and the step log, which are always written."""

    wandb: WandbSection | None = None
    """Weights & Biases; null = not used."""
    tensorboard: bool = False
    """TensorBoard files in output_dir/tensorboard."""


TIME = r"^(?:(?:(?P<days>\d+)-)?(?P<hours>\d{1,3}):)?(?P<minutes>\d{1,3}):(?P<seconds>\d\d)$"
"""How Slurm writes times: minutes:seconds, hours:minutes:seconds, days-hours:minutes:seconds."""


class SaveSection(Section):
    """How checkpoints are kept, and when a run stops by itself. How often it saves, and how many checkpoints stay, is
    TRL's: training.save_strategy, save_steps and save_total_limit."""

    on_error: Literal["error", "warn"] = "error"
    """What follows where a checkpoint can't be written (a full disk, a vanished mount): error = the run ends, warn =
    it goes on without. The checkpoints before stay whole either way."""
    mirror_dir: PathText | None = None
    """A folder on another disk, to which each whole checkpoint is copied in the background. A resume looks there."""
    time_limit: Annotated[str, Field(pattern=TIME, examples=["11:30:00", "2-00:00:00"])] | None = None
    """So long after its start the run saves and stops, as Slurm writes times ('11:30:00'); null = no limit but Slurm's
    own (SLURM_JOB_END_TIME)."""
    seconds_before_end: int = Field(default=120, ge=0)
    """How long before the end of the time it stops: room for the step that is under way and for saving."""


class GuardsSection(Section):
    """What a run does about steps that go wrong. Their rows are named, and stand in output_dir/suspects.jsonl."""

    non_finite_steps: int = Field(default=3, ge=1)
    """The run stops after so many steps in a row whose gradients are not finite. None of them changes a weight."""
    loss_spike: float | None = Field(default=8.0, gt=0)
    """A step is named whose loss exceeds the median of a process's last 64 by so many of their standard deviations
    (estimated by the median deviation, which spikes don't move); null = none is."""


class SystemGainSection(Section):
    """How much the model listens to system messages, measured at each evaluation (train/system_gain/metric.py)."""

    rows: int = Field(default=128, ge=0)
    """So many rows of the validation data, at most, drawn by the seed; 0 = it is not measured."""
    others: int = Field(default=2, ge=1)
    """Other system messages that each of their answers is scored under, at most; and once under none."""


@dataclass(frozen=True)
class _Origin:
    """Where a recipe was read; recipes that say the same are equal, wherever they stand."""

    file: str = field(default="no file", compare=False)
    overrides: tuple[str, ...] = field(default=(), compare=False)


_DEFAULTS_THAT_MATTER = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "gradient_checkpointing",
)


class Recipe(Section):
    """A run of janus-sft: what is trained, on what, and how."""

    model: ModelSection
    """The model that training starts from."""
    chat: ChatSection = ChatSection()
    """How a conversation becomes text, and which part of it is trained."""
    data: DataSection
    """The rows that are trained, and how they are cut and packed."""
    adapter: AdapterSection | None = None
    """LoRA; null = full fine-tuning."""
    quantization: QuantizationSection | None = None
    """4-bit frozen weights under an adapter (QLoRA); null = weights as they are."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Any field of TRL's SFTConfig under its own name, but for those that other sections own."""
    tracking: TrackingSection = TrackingSection()
    """Where figures go besides metrics.jsonl and the step log, which are always written."""
    save: SaveSection = SaveSection()
    """How checkpoints are kept, and when a run stops by itself."""
    guards: GuardsSection = GuardsSection()
    """What a run does about steps that go wrong."""
    system_gain: SystemGainSection = SystemGainSection()
    """How much the model listens to system messages, measured at each evaluation: eval_system_gain in metrics.jsonl;
    as training.metric_for_best_model it makes the best checkpoint the one that listens most."""
    output_dir: PathText
    """Folder for the finished model, its checkpoints, metrics.jsonl and report.md."""
    seed: int = Field(default=42, ge=0, lt=2**32)  # numpy takes no greater one
    """Decides the order of rows, sampled shares and new weights."""

    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    def to_yaml(self) -> str:
        """The resolved recipe: our sections with their defaults filled in, `training` as given. Loads back as equal.

        A comment names the values of TRL's that matter and that `training` leaves to it.
        """
        changes = f" with {' '.join(self._origin.overrides)}" if self._origin.overrides else ""
        comment = " ".join(f"Resolved by janus-sft from {self._origin.file}{changes}".split())
        left_to_trl = ", ".join(f"{name}: {json.dumps(value)}" for name, value in self._left_to_trl())
        if left_to_trl:
            comment += f"\n# TRL's defaults, in force where `training` says nothing: {left_to_trl}"
        return f"# {comment}\n" + yaml.dump(
            self.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, width=120
        )

    def _left_to_trl(self) -> Iterator[tuple[str, Any]]:
        other_names = {"gradient_checkpointing": "activation_checkpointing", "num_train_epochs": "max_steps"}
        for name in _DEFAULTS_THAT_MATTER:
            if self.training.get(name) is None and self.training.get(other_names.get(name, name)) is None:
                default = training_fields()[name].default
                # SFTConfig works this one out of the other
                yield name, not self.training.get("fp16") if name == "bf16" else default


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path`, with `key=value` overrides by dotted key (`data.sources.0.path=x`; a value is YAML).

    An override of `training.max_steps` takes the place of the file's `num_train_epochs`, and the reverse.
    Raises UserError with everything that is wrong with the file and the overrides, each with its line and dotted key.
    """
    document = Document(Path(path))
    for order, override in enumerate(overrides):
        document.override(override, order)
    document.refuse_secrets()
    recipe = validate(document, Recipe)
    recipe._origin = _Origin(document.name, tuple(overrides))
    return recipe
