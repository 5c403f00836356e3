"""Tasks of lm-evaluation-harness on data of ours, and the likelihoods of their choices by a plain loop."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def multiple_choice(name: str, data: Path) -> dict[str, Any]:
    """A task of questions with choices. `data`: lines with `question`, `choices` and the number of the `answer`."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def choice_likelihoods(
    model_folder: Path, questions: list[tuple[str, list[str]]], system: str | None
) -> list[list[float]]:
    """Per question, the log-likelihood of each choice after the rendered chat, with one forward per choice."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    likelihoods = []
    for question, choices in questions:
        turns = [("system", system)] * bool(system) + [("user", question)]
        messages = [{"role": role, "content": text} for role, text in turns]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        of_question = []
        for choice in choices:
            start = tokenizer(prompt, add_special_tokens=False).input_ids
            whole = tokenizer(prompt + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            of_question.append(sum(float(scores[at - 1, whole[at]]) for at in range(len(start), len(whole))))
        likelihoods.append(of_question)
    return likelihoods
