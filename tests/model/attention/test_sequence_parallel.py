"""Sequence parallelism of attention: four ranks compute what one computes, document by document, in float64."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import launch
from transformers import (
    FalconH1Config,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from train.errors import UserError
from train.model.attention.selection import attention_needs
from train.model.attention.sequence_parallel import check_sequence_parallel, shared_heads
from train.model.text_part import build_meta_model
from train.recipe import ModelSection

DOCUMENTS = (5, 1, 13, 5)
SIZE = 8


def by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], window: int | None
) -> torch.Tensor:
    """Return causal attention in a loop over documents and heads: [1, heads, tokens, size]."""
    groups, output, start = query.shape[1] // key.shape[1], torch.zeros_like(query), 0
    for length in lengths:
        part = slice(start, start + length)
        for head in range(query.shape[1]):
            scores = query[0, head, part] @ key[0, head // groups, part].T * SIZE**-0.5
            hidden = torch.ones(length, length).triu(1) + torch.ones(length, length).tril(-(window or length))
            weights = scores.masked_fill(hidden.bool(), -torch.inf).softmax(-1)
            output[0, head, part] = weights @ value[0, head // groups, part]
        start += length
    return output


def compare_ranks() -> None:
    """On each rank: compare its slice of outputs and gradients with those of all tokens."""
    from torch import distributed
    from transformers import AttentionInterface

    from train.model.attention.sequence_parallel import GROUP, register

    distributed.init_process_group("gloo")
    groups = {size: distributed.new_subgroups(size)[0] for size in (2, 4)}

    def of_documents(module, query, key, value, attention_mask, cu_seq_lens_q, sliding_window=None, **kwargs):
        """Compute attention as a kernel for packed documents does, from their borders alone."""
        assert attention_mask is None
        assert not {GROUP, "position_ids"} & kwargs.keys()
        lengths = tuple(cu_seq_lens_q.diff().tolist())
        return by_document(query, key, value, lengths, sliding_window).transpose(1, 2), None

    AttentionInterface.register("of_documents", of_documents)
    for kernel in ("of_documents", "sdpa"):
        register(kernel)
        register(kernel)  # once more changes nothing
    borders = torch.tensor([0, *DOCUMENTS]).cumsum(0).to(torch.int32)
    module = torch.nn.Linear(1, 1, dtype=torch.float64)
    module.config = SimpleNamespace(dtype=torch.float64)
    for size, group in groups.items():
        for heads, key_heads in ((4, 2), (4, 1), (12, 3)):
            generator = torch.Generator().manual_seed(heads)
            whole = [
                torch.randn(1, count, sum(DOCUMENTS), SIZE, generator=generator, dtype=torch.float64)
                for count in (heads, key_heads, key_heads, heads)
            ]
            own = slice(sum(DOCUMENTS) // size * group.rank(), sum(DOCUMENTS) // size * (group.rank() + 1))
            for window in (None, 4) if heads == key_heads * 2 else (None,):
                inputs = [states.clone().requires_grad_() for states in whole[:3]]
                expected = by_document(*inputs, DOCUMENTS, window)
                gradients = torch.autograd.grad(expected, inputs, whole[3])
                for kernel in ("of_documents", "sdpa"):
                    slices = [states[:, :, own].clone().requires_grad_() for states in whole[:3]]
                    output, _ = AttentionInterface()[kernel](
                        module, *slices, None, cu_seq_lens_q=borders, position_ids=torch.zeros(1), scaling=SIZE**-0.5,
                        sliding_window=window, **{GROUP: group},
                    )  # fmt: skip
                    torch.testing.assert_close(output.transpose(1, 2), expected[:, :, own])
                    actual = torch.autograd.grad(output.transpose(1, 2), slices, whole[3][:, :, own])
                    for name, ours, theirs in zip("qkv", actual, gradients, strict=True):
                        torch.testing.assert_close(ours, theirs[:, :, own], msg=lambda text, name=name: name + text)


def test_outputs_and_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    launch(4, None, job=compare_ranks, logs=tmp_path).succeeded()


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "shared"),
    [(32, 8, 2, 8), (32, 8, 8, 8), (32, 8, 16, 16), (12, 3, 2, 6), (40, 10, 8, 40), (36, 4, 6, 12), (4, 1, 4, 4)],
)
def test_copies_of_key_heads_are_as_few_as_the_ranks_need(heads: int, key_heads: int, size: int, shared: int) -> None:
    assert shared_heads(heads, key_heads, size) == shared
    fitting = (count for count in range(key_heads, heads + 1, key_heads) if heads % count == count % size == 0)
    assert next(fitting) == shared


TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(**TINY, num_attention_heads=4), None),
        (MistralConfig(**TINY, num_attention_heads=4, num_key_value_heads=1, sliding_window=8), None),
        (LlamaConfig(**TINY, num_attention_heads=2), "does not divide the 2 attention heads of tiny. Allowed: 1, 2."),
        (Lfm2Config(**TINY, num_attention_heads=4, layer_types=["conv", "full_attention"]), "has others (conv)"),
        (FalconH1Config(**TINY, num_attention_heads=4, mamba_d_ssm=32, mamba_n_heads=4), "needs layers of attention"),
        (MixtralConfig(**TINY, num_attention_heads=4), "or `training.router_aux_loss_coef: 0.0`"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64), "needs layers of attention"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_only_models_whose_layers_attend_are_divided(config: PreTrainedConfig, words: str | None) -> None:
    recipe = SimpleNamespace(model=ModelSection(name_or_path="tiny", sequence_parallel=4), training={})
    bare = build_meta_model(config, recipe.model)
    needs = attention_needs(recipe, config)
    if words is None:
        check_sequence_parallel(recipe, bare, needs, "sdpa")
        with pytest.raises(UserError, match="does not support the attention kernel flex_attention"):
            check_sequence_parallel(recipe, bare, needs, "flex_attention")
        return
    with pytest.raises(UserError) as error:
        check_sequence_parallel(recipe, bare, needs, "sdpa")
    assert words in " ".join(str(error.value).split())
    if config.model_type == "mixtral":
        recipe.training["router_aux_loss_coef"] = 0.0
        check_sequence_parallel(recipe, bare, needs, "sdpa")
