"""Bytes that a forward and backward pass hold: activations, and TRL's fused output layer."""

from typing import Literal, NamedTuple

from transformers import PreTrainedConfig

from train.model.architecture import Architecture, inspect_architecture
from train.recipe import Recipe

Checkpointing = Literal["none", "selective", "full"]

TOKEN_CHUNK, VOCABULARY_CHUNK = 4_096, 32_768
"""Size of TRL's tiles of logits: TOKEN_CHUNK_SIZE in trl/kernels/chunked_logprob.py and _CHUNKED_LOGPROB_CHUNK_SIZE in
trl/trainer/utils.py (1.16)."""


class Precision(NamedTuple):
    """Bytes of an element: of the weights in the forward pass, and of the operands of matrix products.

    They differ under autocast, which casts float32 weights when they are used.
    """

    weights: int
    compute: int


class Activations(NamedTuple):
    """Bytes on one GPU.

    - `kept`: from the forward pass until the backward pass has used them;
    - `working`: what the backward of one layer needs besides;
    - `head`: output layer and loss.
    """

    kept: int
    working: int
    head: int

    @property
    def peak(self) -> int:
        """Maximum over time: the head's memory is free again when the backward of the first layer begins."""
        return self.kept + max(self.working, self.head)


class ActivationTracer:
    """Activations of a run's micro-batches on one GPU, under the settings that a plan compares. It remembers each."""

    def __init__(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        self._recipe = recipe
        self._config = config
        self._shape: Architecture | None = None

    def activations(
        self, *, weights: str, autocast: bool, checkpointing: Checkpointing, tokens: int, longest: int
    ) -> Activations:
        """Return the bytes of one micro-batch.

        - `weights`: dtype that the weights have in the forward pass ("bfloat16", "float16" or "float32");
        - `autocast`: matrix products compute in bfloat16;
        - `checkpointing`: none, selective (TRL's) or full;
        - `tokens`: of the micro-batch, all of its sequences together;
        - `longest`: tokens of the longest sequence in it.
        """
        if self._shape is None:
            self._shape = inspect_architecture(self._recipe, self._config)
        itemsize = 4 if weights == "float32" else 2
        return estimate_activations(
            self._shape,
            tokens,
            Precision(itemsize, 2 if autocast else itemsize),
            checkpointing=checkpointing == "full",
            adapter_dropout=bool(self._recipe.adapter and self._recipe.adapter.lora_dropout),
            squared_length=longest if self._recipe.model.attention == "eager" else 0,
        )


def layer_bytes(shape: Architecture, precision: Precision, squared_length: int = 0) -> int:
    """Return the bytes per token that one decoder layer keeps for its backward without gradient checkpointing.

    `squared_length`: tokens of a row if the attention kernel keeps all scores (eager), else 0.

    Korthikanti et al. (arXiv:2205.05198, section 4.1) count 34 bytes times hidden size and a term in the square of the
    length for GPT's layer. Here, counted in transformers' modeling_llama.py, with `b` = compute bytes:

    - FlashAttention keeps queries, keys, values, its output and a float32 per head, and no square (Dao et al.,
      arXiv:2205.14135). Eager attention keeps its softmax in float32 and cast; with soft-capping the capped scores too.
    - Each RMSNorm keeps its input and its divisor in float32, its normalized value (Gemma's in float32) and its output:
      4 + b + b per hidden element. Under autocast the output is kept once per linear layer that reads it, as each casts
      it again.
    - The gated feed-forward network keeps four of its intermediate values: gate, activation, up, and their product.
    """
    b = precision.compute
    normalized = 4 if shape.wide_norms else precision.weights
    if precision.weights == b:
        norms = shape.norms * (shape.hidden * (4 + normalized + b) + 4)
    else:
        norms = shape.norms * (shape.hidden * (4 + normalized) + 4) + (3 + 2) * shape.hidden * b
    attention = (2 * shape.query_width + 2 * shape.key_width) * b + 4 * shape.heads
    scores = shape.heads * squared_length * (4 + (2 if shape.softcapped else 1) * b)
    return norms + attention + 4 * shape.intermediate * b + scores


def estimate_activations(
    shape: Architecture,
    tokens: int,
    precision: Precision,
    *,
    checkpointing: bool,
    adapter_dropout: bool = False,
    squared_length: int = 0,
) -> Activations:
    """Return the bytes of one micro-batch of `tokens` tokens on one GPU.

    - With gradient checkpointing (TRL's default) only the input of each layer is kept, and layers are computed again
      one at a time (Chen et al., arXiv:1604.06174; Korthikanti et al., section 5: 2 bytes times hidden size a layer).
    - `working` adds the gradients of the two widest activations of a layer.
    - An adapter keeps its input in float32, and with dropout a copy and a byte of mask.
    - Autocast keeps its casts of trained weights until the forward pass ends.
    """
    layer = (
        layer_bytes(shape, precision, squared_length)
        + shape.adapted_inputs * (9 if adapter_dropout else 4) // shape.layers
    )
    gradients = 2 * shape.intermediate * precision.compute
    stream = shape.hidden * precision.weights
    casts = 0
    if precision.weights != precision.compute:
        casts = precision.compute * sum(
            parameter.elements
            for parameter in shape.parameters
            if parameter.trained and len(parameter.shape) > 1 and parameter.role != "embedding"
        )
    ends = 2 * stream  # the outputs of the embedding and of the last norm
    if checkpointing:
        kept, working = tokens * (shape.layers * stream + ends) + casts, tokens * (layer + gradients)
    else:
        kept, working = tokens * (shape.layers * layer + ends) + casts, tokens * gradients
    return Activations(kept, working, head_bytes(shape, tokens, precision))


def head_bytes(shape: Architecture, tokens: int, precision: Precision) -> int:
    """Return the peak of TRL's fused output layer, which is in its backward.

    It holds (ChunkedLogProbFunction in trl/kernels/chunked_logprob.py):

    - a tile of logits, 4,096 tokens x 32,768 entries of the vocabulary;
    - the hidden states of the trained positions, at most all, and their gradient in float32;
    - seven float32 statistics per token;
    - if the output layer is trained, its gradient in float32 and once more in the weight's dtype.
    """
    tile = min(tokens, TOKEN_CHUNK) * VOCABULARY_CHUNK * precision.compute
    hidden = tokens * shape.hidden * (precision.weights + 4)
    trained = any(
        parameter.trained
        and parameter.shape == (shape.vocabulary, shape.hidden)
        and (shape.tied or parameter.role != "embedding")
        for parameter in shape.parameters
    )
    weight = shape.vocabulary * shape.hidden * (4 + precision.weights) if trained else 0
    return tile + hidden + 7 * 4 * tokens + weight
