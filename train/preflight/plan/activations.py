"""Bytes that a forward and backward pass keep: activations, and TRL's fused output layer."""

from typing import NamedTuple

from train.model.architecture import Architecture

TOKEN_CHUNK, VOCABULARY_CHUNK = 4_096, 32_768
"""TRL's tiles of logits: TOKEN_CHUNK_SIZE in trl/kernels/chunked_logprob.py and _CHUNKED_LOGPROB_CHUNK_SIZE in
trl/trainer/utils.py (1.16)."""


class Precision(NamedTuple):
    """Bytes of an element. `weights`: as the forward pass finds them; `compute`: what matrices are multiplied in.

    They differ under autocast, where float32 weights are cast as they are used.
    """

    weights: int
    compute: int


class Activations(NamedTuple):
    """Bytes on one GPU. `kept`: from the forward pass until the backward has used them; `working`: what the backward of
    one layer needs beside that; `head`: the output layer and its loss."""

    kept: int
    working: int
    head: int

    @property
    def peak(self) -> int:
        """The head is done with before the first layer's backward begins, so its room is used twice."""
        return self.kept + max(self.working, self.head)


def layer_bytes(shape: Architecture, precision: Precision, squared_length: int = 0) -> int:
    """Bytes a token that one decoder layer keeps for its backward without gradient checkpointing.

    `squared_length`: tokens of a row, where the attention kernel keeps all scores (eager), else 0.

    Korthikanti et al. (arXiv:2205.05198, section 4.1) count 34 bytes times hidden size and a term in the square of the
    length for GPT's layer. FlashAttention keeps no square (Dao et al., arXiv:2205.14135): queries, keys, values, its
    output and one float32 a head. The rest, counted in transformers' modeling_llama.py, where `b` = compute bytes:
    each RMSNorm its input and its divisor in float32, its normalized value (Gemma's in float32) and its output (4 + b +
    b of each hidden element; the output once for each linear that reads it under autocast, which casts anew for each),
    the gated feed-forward network four of its intermediate elements (gate, its activation, up, their product). Eager
    attention keeps its softmax in float32 and cast, soft-capping the capped scores too.
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


def activations(
    shape: Architecture,
    tokens: int,
    precision: Precision,
    *,
    checkpointing: bool,
    adapter_dropout: bool = False,
    squared_length: int = 0,
) -> Activations:
    """Bytes of one micro-batch of `tokens` tokens on one GPU, all GPUs alike.

    With gradient checkpointing (TRL's default) only the input of each layer is kept, and one layer is computed again at
    a time (Chen et al., arXiv:1604.06174; Korthikanti et al., section 5: 2 bytes times hidden size a layer). `working`
    adds the gradients of the two widest activations of the layer. An adapter keeps its input in float32, and under
    dropout a copy and a byte of mask. Autocast keeps its casts of trained weights until the forward ends.
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
            one.elements for one in shape.parameters if one.trained and len(one.shape) > 1 and one.role != "embedding"
        )
    ends = 2 * stream  # the embeddings' output, and the last norm's for the head
    if checkpointing:
        kept, working = tokens * (shape.layers * stream + ends) + casts, tokens * (layer + gradients)
    else:
        kept, working = tokens * (shape.layers * layer + ends) + casts, tokens * gradients
    return Activations(kept, working, head_bytes(shape, tokens, precision))


def head_bytes(shape: Architecture, tokens: int, precision: Precision) -> int:
    """Most bytes that TRL's fused output layer holds at once, in its backward.

    No logits but a tile of 4,096 tokens x 32,768 entries; the hidden states of the trained positions (all, at worst)
    and their gradient in float32; seven float32 statistics a token; and where the output layer is trained, its whole
    gradient in float32 and once more in the weight's dtype (ChunkedLogProbFunction in trl/kernels/chunked_logprob.py).
    """
    tile = min(tokens, TOKEN_CHUNK) * VOCABULARY_CHUNK * precision.compute
    hidden = tokens * shape.hidden * (precision.weights + 4)
    trained = any(
        one.trained and one.shape == (shape.vocabulary, shape.hidden) and (shape.tied or one.role != "embedding")
        for one in shape.parameters
    )
    weight = shape.vocabulary * shape.hidden * (4 + precision.weights) if trained else 0
    return tile + hidden + 7 * 4 * tokens + weight
