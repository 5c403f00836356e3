"""Rows of a batch joined into one, without padding: the models that keep them apart by their borders alone.

padded     [ a a a . . ]        joined     [ a a a | b b b b b ]      borders 0, 3, 8; positions restart
           [ b b b b b ]

FlashAttention and sdpa_by_document take the borders and compute nothing across them, so that a joined batch costs what
its rows do. Other kernels would compute the attention of each row to all rows and mask it: for them padding costs less.
"""

from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from train.model.attention import torch_varlen as varlen

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""transformers' names of the layers that have no state besides the keys and values of attention."""


def takes_borders(model: PreTrainedModel) -> bool:
    """Return whether the rows of a batch can be joined.

    Not for layers that carry a state from token to token (state spaces, linear attention, convolutions): whether it is
    reset at a border depends on their kernels.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or _ATTENTION
    attends_only = not getattr(model, "_is_stateful", False) and _ATTENTION.issuperset(layers)
    by_borders = config._attn_implementation in (varlen.NAME, varlen.BY_DOCUMENT)
    return attends_only and (by_borders or is_flash_attention_requested(config))
