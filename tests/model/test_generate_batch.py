"""Generation in a batch: the answers of prompts one by one, and a model and a tokenizer as they were."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.model.inference import generate_batch

PROMPTS = ["river stone", "a", "paper window harbor seven maple north silver orbit"]


def test_a_batch_has_the_answers_of_its_prompts_one_by_one(tiny_model: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    together = generate_batch(model, tokenizer, PROMPTS, max_new_tokens=9)
    alone = [generate_batch(model, tokenizer, [prompt], max_new_tokens=9)[0] for prompt in PROMPTS]
    assert together == alone
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    for prompt, answer in zip(ids, together, strict=True):
        row = list(prompt)
        while len(row) < len(prompt) + answer.tokens:  # a plain loop without a cache
            with torch.no_grad():
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        assert tokenizer.decode(row[len(prompt) :], skip_special_tokens=True) == answer.text


def test_model_and_tokenizer_stay_as_they_were(tiny_model: Path, tmp_path: Path) -> None:
    """Modes of modules, settings of the tokenizer that are saved with it, and weights that can still be trained."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    tokenizer(PROMPTS)  # as training has done before
    tokenizer.save_pretrained(tmp_path / "before")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    generated = generate_batch(model, tokenizer, PROMPTS, max_new_tokens=4)
    assert len(generated) == 3
    assert [module.training for module in model.modules()] == modes
    tokenizer.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes(), file.name
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
