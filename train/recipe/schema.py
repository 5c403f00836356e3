"""Schema of a recipe, the YAML file that describes a training run: strict, each key documented by its docstring.

    python -m train.recipe --schema > recipes/schema.json     JSON Schema for completion in editors

Nothing heavy is imported here: all errors in a recipe are reported at once, within a second.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, PrivateAttr, Tag, model_serializer

from train.recipe.measurements import EvaluationSection, SystemGainSection
from train.recipe.preference import PreferenceSection
from train.recipe.section import PathText, Section, Text
from train.recipe.sft_config import training_fields
from train.recipe.sources import TrainingSources
from train.recipe.validation import validate_recipe
from train.recipe.yaml_document import Document, RecipeDumper


def _branch(value: object) -> str:
    """Select the branch of a union `value | list`, so that errors are only about that branch."""
    return "<list>" if isinstance(value, list | tuple) else "<single>"


def _name_or_hub(value: object) -> str:
    """Select the branch of a union of known names and `publisher/kernel` on the hub."""
    return "<hub>" if isinstance(value, str) and "/" in value else "<single>"


AttentionName = Literal[
    "auto",
    "flash_attention_4",
    "flash_attention_3",
    "flash_attention_2",
    "torch_varlen",
    "flex_attention",
    "sdpa_by_document",
    "sdpa",
    "eager",
]
HubKernelName = Annotated[
    str,
    Field(
        pattern=r"^[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?$",
        examples=["kernels-community/flash-attn3", "kernels-community/flash-attn2@v4"],
    ),
]
"""A kernel of the hub, by a name that transformers accepts: `publisher/repository[@revision][:function]`."""
Texts = Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]  # immutable


class ModelSection(Section):
    """The model that training starts from."""

    name_or_path: PathText
    """Folder of a model, or its id on the Hugging Face hub."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null = its main branch."""
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = "bfloat16"
    """Type of the weights in memory; auto = as saved. Full fine-tuning on one process or with DDP needs float32;
    `training.bf16` computes in bfloat16 all the same. DeepSpeed and FSDP keep float32 copies of 16-bit weights."""
    allow_16bit_training: bool = False
    """Train 16-bit weights in full without float32 copies, which is refused otherwise: updates below the last bit of a
    weight are lost. With AdamW at a learning rate of 5e-6, 92% of the weights never moved in 100 steps."""
    attention: Annotated[
        Annotated[AttentionName, Tag("<single>")] | Annotated[HubKernelName, Tag("<hub>")],
        Discriminator(_name_or_hub),
    ] = "auto"
    """Attention kernel; auto = the fastest available one that supports this model and keeps packed documents isolated
    (the start screen names it, and why faster ones were not selected). torch_varlen = FlashAttention with the kernels
    that torch ships; flash_attention_N require the packages flash-attn-4, flash-attn-3 (built from source) or
    flash-attn; kernels-community/flash-attn3 and others (publisher/kernel[@revision], with :function where transformers
    doesn't know the kernel) = compiled kernels of the hub, through the package kernels; sdpa and eager compute
    attention across documents and mask it; sdpa_by_document = sdpa over one packed document after the other, for
    CPUs, where auto takes it for pairs."""
    sequence_parallel: int = Field(default=1, ge=1)
    """GPUs that share each sequence, for sequences too long for one (DeepSpeed-Ulysses, arXiv:2309.14509). Each GPU
    holds the activations of its part of the tokens, and computes attention over all tokens for its part of the heads:
    the number must divide the GPUs and the attention heads. The loss is that of one GPU, up to rounding."""
    use_kernels: bool = False
    """Replace layers (RMSNorm and others) by compiled ones of the hub, as TRL recommends instead of
    `training.use_liger_kernel`. Requires a GPU and the package kernels, which downloads them."""
    float8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Matrix multiplication in float8 by one of torchao's recipes; null = in the type of the weights. Applies to all
    linear layers but the first and the last whose sizes are multiples of 16; weights, gradients and checkpoints keep
    their types. Requires the package torchao, bfloat16, a GPU of compute capability 8.9 or later (Ada, Hopper,
    Blackwell), and for any speed-up `training.torch_compile: true`. tensorwise = one scale per tensor: the fastest;
    packed documents share scales; rowwise = one scale per token: more exact; rowwise_with_gw_hp = weight gradients in
    bfloat16 too: the most exact. Not with `quantization` or DoRA. The start screen shows the effect on the loss."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Read that code first."""
    allow_pickle: bool = False
    """Load weights from pickle files, which can run code when opened, where there are no safetensors."""


class ChatSection(Section):
    """Rendering of conversations, and which part of them is trained."""

    template: PathText | None = None
    """Chat template: a name in train/data/templates, the path of a .jinja file, or the name of one of the tokenizer's
    templates (tool_use); null = the tokenizer's own (`default` where it has several)."""
    system_role: Literal["native", "merge_into_user", "turn", "error"] = "native"
    """Handling of system messages; native = as the template renders them (an error if it drops them);
    merge_into_user = prepended to the next user turn; turn = a turn of their own, formatted like a user turn, for
    templates without a system role (as SYSGEN did for Gemma-2); error = rows with one are refused. The saved
    tokenizer's template does the same."""
    default_system: str | None = None
    """System message of conversations without one, also written into the saved template; null = the template's own
    default, if it has one; "" = remove the template's default."""
    control_tokens_in_text: Literal["error", "escape", "allow"] = "error"
    """Handling of control tokens (<|im_end|>) typed in a message, which would end a turn or start another; error = the
    row is refused; escape = an invisible character splits them; allow = they act as control tokens."""
    train_on: Literal["assistant", "last"] = "assistant"
    """Trained turns: all assistant turns, or the last one of each conversation; always with their end token."""


class DataSection(Section):
    """Training and validation rows, their truncation and packing."""

    sources: TrainingSources
    """Sources of the rows; at least one."""
    validation: (
        Annotated[
            Annotated[float, Field(gt=0, lt=1), Tag("<single>")] | Annotated[TrainingSources, Tag("<list>")],
            Discriminator(_branch),
        ]
        | None
    ) = None
    """Validation rows: a share of the sources, or sources of their own; null = none."""
    max_length: int = Field(ge=8)
    """Maximum tokens of a row, and of a packed sequence. There is no default: longer rows are dropped or truncated,
    which a default (TRL's is 1,024) would do unnoticed. Look at the row lengths (`--check`), then choose."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """Handling of rows longer than `max_length`. Dropped and truncated rows are counted and reported."""
    packing: bool = True
    """Pack several rows into one sequence of `max_length` tokens; attention does not cross rows. false = a sequence
    is a row; FlashAttention and torch_varlen join the rows of a batch without padding, other kernels pad them."""
    repack: bool = True
    """Pack other rows together in each epoch, as shuffling would; the number of sequences stays the same."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Handling of rows that can't be trained (no assistant turn, unknown role, ...); each kind is counted."""
    allow_pickle: bool = False
    """Read data from pickle files, which can run code when opened."""
    cache_dir: PathText | None = None
    """Folder of the token cache; null = janus-sft in HF_HOME (~/.cache/huggingface)."""
    processes: int | None = Field(default=None, ge=1)
    """Processes that tokenize; null = one per core available to the job."""


class AdapterSection(Section):
    """LoRA, with the names of peft's LoraConfig."""

    r: int = Field(default=16, gt=0)
    """Rank of the update matrices."""
    lora_alpha: float = Field(default=32, gt=0)
    """Scale of the update: lora_alpha / r (with rsLoRA lora_alpha / sqrt(r))."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the adapter."""
    target_modules: Annotated[
        Annotated[Literal["all-linear"], Tag("<single>")] | Annotated[Texts, Tag("<list>")], Discriminator(_branch)
    ] = "all-linear"
    """Modules with an adapter: all-linear = all linear layers but the output layer, or a list of module names."""
    use_dora: bool = False
    """Use weight-decomposed LoRA (DoRA): slower, better at small ranks."""
    use_rslora: bool = False
    """Use rank-stabilised LoRA: scale lora_alpha / sqrt(r)."""
    modules_to_save: Texts | None = None
    """Modules that are fully trained and saved with the adapter."""


class QuantizationSection(Section):
    """4-bit quantization of the frozen weights (QLoRA), with the names of transformers' BitsAndBytesConfig. Requires
    `adapter`."""

    load_in_4bit: Literal[True] = True
    """Always true; for weights without quantization remove the section."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Data type of the weights; nf4 is made for normally distributed weights, as trained models have."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the scales too: saves 0.4 bits per weight."""
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of computation."""
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "bfloat16"
    """Data type that stores the packed weights; that of the other weights lets FSDP and ZeRO-3 shard them."""


class WandbSection(Section):
    """Weights & Biases. The key comes from the environment (WANDB_API_KEY), never from a recipe."""

    project: Text = "janus-sft"
    """Project of the run."""
    entity: Text | None = None
    """Team or user; null = the default of the account."""
    name: Text | None = None
    """Name of the run; null = generated by wandb."""
    group: Text | None = None
    """Group of the run."""
    tags: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Tags of the run."""
    mode: Literal["online", "offline"] = "online"
    """offline = write to output_dir only, without an account; `wandb sync` uploads it later."""


class TrackingSection(Section):
    """Trackers, in addition to metrics.jsonl and the step log."""

    wandb: WandbSection | None = None
    """Weights & Biases; null = not used."""
    tensorboard: bool = False
    """Write TensorBoard files to output_dir/tensorboard."""


TIME = r"^(?:(?:(?P<days>\d+)-)?(?P<hours>\d{1,3}):)?(?P<minutes>\d{1,3}):(?P<seconds>\d\d)$"
"""Time as Slurm writes it: minutes:seconds, hours:minutes:seconds, days-hours:minutes:seconds."""


class SaveSection(Section):
    """Checkpoints and time limits. How often a run saves, and how many checkpoints it keeps, is set by
    training.save_strategy, save_steps and save_total_limit."""

    on_error: Literal["error", "warn"] = "error"
    """Handling of a checkpoint that can't be written (full disk, lost mount): error = the run ends, warn = it continues
    without. Earlier checkpoints stay complete either way."""
    mirror_dir: PathText | None = None
    """Folder on another disk to which complete checkpoints are copied in the background; a resume searches it too."""
    time_limit: Annotated[str, Field(pattern=TIME, examples=["11:30:00", "2-00:00:00"])] | None = None
    """Time after which the run saves and stops, written as Slurm writes it ('11:30:00'); null = only Slurm's limit
    (SLURM_JOB_END_TIME)."""
    seconds_before_end: int = Field(default=120, ge=0)
    """Seconds before the time limit at which the run stops: time to finish a step and to save."""


class GuardsSection(Section):
    """Handling of non-finite steps and loss spikes. Their rows are reported and listed in output_dir/suspects.jsonl."""

    non_finite_steps: int = Field(default=3, ge=1)
    """Consecutive steps with non-finite gradients after which the run stops. Such steps change no weights."""
    loss_spike: float | None = Field(default=8.0, gt=0)
    """Threshold of a loss spike, in standard deviations above the median of a process's last 64 losses (estimated from
    the median absolute deviation, which is robust to spikes); null = off."""


@dataclass(frozen=True)
class _Origin:
    """File and overrides of a recipe; not part of its equality."""

    file: str = field(default="no file", compare=False)
    overrides: tuple[str, ...] = field(default=(), compare=False)


_REPORTED_DEFAULTS = (
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
    """A training run of janus-sft: model, data and settings."""

    model: ModelSection
    """The model that training starts from."""
    chat: ChatSection = ChatSection()
    """Rendering of conversations, and which part of them is trained."""
    data: DataSection
    """Training and validation rows, their truncation and packing."""
    adapter: AdapterSection | None = None
    """LoRA; null = full fine-tuning."""
    quantization: QuantizationSection | None = None
    """4-bit quantization of the frozen weights under an adapter (QLoRA); null = none."""
    preference: PreferenceSection | None = None
    """Preference training on pairs, with train/preference.py; null = supervised fine-tuning, with train/sft.py."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Any field of TRL's SFTConfig under its own name, except those that other sections own."""
    tracking: TrackingSection = TrackingSection()
    """Trackers, in addition to metrics.jsonl and the step log."""
    save: SaveSection = SaveSection()
    """Checkpoints and time limits."""
    guards: GuardsSection = GuardsSection()
    """Handling of non-finite steps and loss spikes."""
    system_gain: SystemGainSection = SystemGainSection()
    """System gain, how much the model follows system messages, measured at each evaluation: eval_system_gain in
    metrics.jsonl. As training.metric_for_best_model it selects the best checkpoint."""
    evaluation: EvaluationSection | None = None
    """Answers that the model generates at each evaluation; null = none. The shares that follow the system message are
    metrics of the evaluation; as training.metric_for_best_model one of them selects the best checkpoint."""
    output_dir: PathText
    """Folder of the finished model, its checkpoints, metrics.jsonl and report.md."""
    seed: int = Field(default=42, ge=0, lt=2**32)  # numpy's limit
    """Seed of the row order, of sampling and of new weights."""

    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    @model_serializer(mode="wrap")
    def _leave_out_preference(self, serialize: Callable[["Recipe"], dict[str, Any]]) -> dict[str, Any]:
        """Return the sections; `preference` only if it is set: records of runs from before it was there stay equal."""
        sections = serialize(self)
        return {name: value for name, value in sections.items() if name != "preference" or value is not None}

    @property
    def command(self) -> str:
        """Return the command that trains this recipe."""
        return "train/sft.py" if self.preference is None else "train/preference.py"

    @property
    def documents_per_row(self) -> int:
        """Return the number of documents that a row is trained as: 2 of a pair."""
        return 1 if self.preference is None else 2

    @property
    def sequence_length(self) -> int:
        """Return the most tokens of a sequence: one row of `data.max_length`, or both halves of a pair."""
        return self.data.max_length * self.documents_per_row

    @property
    def joins_documents(self) -> bool:
        """Return whether the documents of a batch are joined without padding, whatever the model."""
        return self.data.packing or self.preference is not None

    @property
    def trains_reward_model(self) -> bool:
        """Return whether the model scores answers and writes none."""
        return self.preference is not None and self.preference.loss == "reward"

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML, which loads as an equal recipe.

        Our sections have their defaults filled in; `training` is as given, and a comment lists important defaults of
        TRL's that it leaves unset.
        """
        changes = f" with {' '.join(self._origin.overrides)}" if self._origin.overrides else ""
        comment = " ".join(f"Resolved by janus-sft from {self._origin.file}{changes}".split())
        defaults = ", ".join(f"{name}: {json.dumps(value)}" for name, value in self._trl_defaults())
        if defaults:
            comment += f"\n# TRL's defaults for keys that `training` does not set: {defaults}"
        return f"# {comment}\n" + yaml.dump(
            self.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, width=120
        )

    def _trl_defaults(self) -> Iterator[tuple[str, Any]]:
        other_names = {"gradient_checkpointing": "activation_checkpointing", "num_train_epochs": "max_steps"}
        for name in _REPORTED_DEFAULTS:
            if self.training.get(name) is None and self.training.get(other_names.get(name, name)) is None:
                default = training_fields()[name].default
                # SFTConfig derives bf16 from fp16.
                yield name, not self.training.get("fp16") if name == "bf16" else default


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in `path`, with overrides applied.

    Raises UserError with all errors of the file and the overrides, each with its line and dotted key.

    Args:
        path: YAML file.
        overrides: `key=value` by dotted key, such as `data.sources.0.path=x`; values are YAML. An override of
            `training.max_steps` replaces the file's `num_train_epochs`, and the reverse.
    """
    document = Document(Path(path))
    for order, override in enumerate(overrides):
        document.override(override, order)
    document.refuse_secrets()
    recipe = validate_recipe(document, Recipe)
    recipe._origin = _Origin(document.name, tuple(overrides))
    return recipe
