"""Section `preference`: training on pairs of a chosen and a rejected answer, with the names of TRL's DPOConfig and
RewardConfig."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer

from train.recipe.section import Section
from train.recipe.sft_config import TOKEN_LOSSES
from train.recipe.yaml_document import Document

PREFERENCE_METRICS = ("rewards/accuracies", "rewards/margins", "rewards/chosen")
"""Metrics of an evaluation on pairs that can select the best model; more is better."""
REWARD_METRICS = ("accuracy", "margin")
"""Those of a reward model."""

LossType = Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sigmoid_norm", "sft"]

_KEYS = {
    "dpo": ("beta", "loss_type", "loss_weights", "label_smoothing", "pairs"),
    "orpo": ("beta", "pairs"),
    "reward": ("center_rewards_coefficient", "pairs"),
}
"""Keys that each loss has."""


class PreferenceSection(Section):
    """Preference training (train/preference.py): each row is a pair, the same prompt with a chosen and a rejected
    answer."""

    loss: Literal["dpo", "orpo", "reward"]
    """dpo = the loss of the pair relative to the model before training (arXiv:2305.18290), whose log-probabilities are
    computed once and cached; orpo = the loss of the chosen answer plus an odds ratio (arXiv:2403.07691), without a
    reference; reward = a reward model: the language model with a `score` head in place of its output layer, which
    learns to score the chosen answer higher (transformers' AutoModelForSequenceClassification with one label; a folder
    that is one already is trained on)."""
    beta: float = Field(default=0.1, gt=0)
    """dpo: strength of the pull towards the model before training, `beta` of DPOConfig; orpo: weight of the odds ratio,
    `beta` of ORPOConfig (lambda in the paper, alpha in its code)."""
    loss_type: Annotated[tuple[LossType, ...], Field(strict=False, min_length=1)] = ("sigmoid",)
    """Losses of dpo, which are added, as in DPOConfig: sigmoid = DPO itself; sft = that of the chosen answer."""
    loss_weights: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False, min_length=1)] | None = None
    """A weight for each of `loss_type`; null = 1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round, for the loss type robust."""
    center_rewards_coefficient: float | None = Field(default=None, ge=0)
    """reward: weight of the squared sum of a pair's scores, which centers the scores at 0 (arXiv:2312.09244, which
    takes 0.01); null = 0."""
    pairs: Literal["one", "all"] = "one"
    """Pairs of sources whose rows have no `chosen` and `rejected`. Rows with the same instruction under other system
    messages are siblings: each row's answer is chosen under its own message, and a sibling's is rejected. one = with
    one sibling, in an order drawn by `seed`, so that each answer is rejected about as often as chosen; all = with each
    sibling, at most 100 of an instruction."""

    @model_serializer(mode="wrap")
    def _leave_out_others(self, serialize: Callable[["PreferenceSection"], dict[str, Any]]) -> dict[str, Any]:
        """Return the keys that the loss has."""
        return {name: value for name, value in serialize(self).items() if name in ("loss", *_KEYS[self.loss])}

    def describe(self) -> str:
        """Return the loss and its settings: `dpo, loss_type: [sigmoid], beta: 0.1`."""
        if self.loss == "reward":
            centered = self.center_rewards_coefficient
            return "reward" if centered is None else f"reward, center_rewards_coefficient: {centered:g}"
        settings = [f"beta: {self.beta:g}"]
        if self.loss == "dpo":
            settings.insert(0, f"loss_type: [{', '.join(self.loss_type)}]")
            settings += [f"loss_weights: {[*self.loss_weights]}"] if self.loss_weights else []
            settings += [f"label_smoothing: {self.label_smoothing:g}"] if self.label_smoothing else []
        return ", ".join([self.loss, *settings])


def resolve_system_gain(document: Document) -> None:
    """Switch the system gain, which is on by default, off for a reward model."""
    if document.section("preference").get("loss") == "reward":
        document.tree.setdefault("system_gain", {"rows": 0})


def check_preference(document: Document) -> None:
    """Add an error for each key that conflicts with section `preference`, or needs it."""
    data = document.section("data")
    lists = {name: data[name] for name in ("sources", "validation") if isinstance(data.get(name), list)}
    sources: list[tuple[tuple[str, str, int], dict[str, Any]]] = [
        (("data", name, number), source)
        for name, values in lists.items()
        for number, source in enumerate(values)
        if isinstance(source, dict)
    ]
    if document.tree.get("preference") is None:
        for path, source in sources:
            if source.get("format") == "preference":
                message = "pairs of a chosen and a rejected answer need the section `preference`, such as {loss: dpo}."
                document.add_error((*path, "format"), message)
        return
    _check_losses(document)
    for path, source in sources:
        if source.get("loss_weight", 1) != 1:
            remedy = "Write 1 here, and `weight` for how often the source is seen"
            document.add_error((*path, "loss_weight"), f"the losses of pairs have no weights. {remedy}.")
    training = document.section("training")
    if training.get("loss_type", "nll") not in (TOKEN_LOSSES[0], TOKEN_LOSSES[-1]):
        document.add_error(("training", "loss_type"), "the loss is set by `preference`. Remove this key.")
    if training.get("label_smoothing_factor"):
        message = "labels of tokens are not smoothed here. Remove this key."
        document.add_error(("training", "label_smoothing_factor"), message)
    if document.section("adapter").get("lora_dropout"):
        message = "pairs are trained without dropout, as TRL does. Write 0."
        document.add_error(("adapter", "lora_dropout"), message)
    if document.section("model").get("sequence_parallel") not in (None, 1):
        message = "the log-probability of an answer needs all of its tokens on one GPU. Write 1 here."
        document.add_error(("model", "sequence_parallel"), message)


def _check_losses(document: Document) -> None:
    section = document.section("preference")
    _check_keys(document, section)
    if section.get("loss") == "reward":
        _check_reward(document)
    if section.get("loss") != "dpo":
        return
    types, weights = section.get("loss_type", ["sigmoid"]), section.get("loss_weights")
    if isinstance(types, list) and isinstance(weights, list) and len(types) != len(weights):
        message = f"{len(weights)} for {len(types)} in `preference.loss_type`. Write one weight for each."
        document.add_error(("preference", "loss_weights"), message)
    if isinstance(weights, list) and weights and not any(weights):
        document.add_error(("preference", "loss_weights"), "all are 0: nothing would be trained. Write one above 0.")
    if section.get("label_smoothing") and "robust" not in types:
        message = "has no effect without `preference.loss_type: [robust]`. Remove it, or add robust."
        document.add_error(("preference", "label_smoothing"), message)


def _check_keys(document: Document, section: dict[str, Any]) -> None:
    """Add an error for each key that belongs to other losses."""
    own = _KEYS.get(str(section.get("loss")))
    for name in section if own else ():
        owners = " and ".join(f"`loss: {other}`" for other, keys in _KEYS.items() if name in keys)
        if own and owners and name not in own:
            document.add_error(("preference", name), f"belongs to {owners}. Remove this key.")


def _check_reward(document: Document) -> None:
    """Add an error for what needs a language model."""
    for name in "evaluation", "system_gain":
        if document.tree.get(name) is not None and document.section(name).get("rows") != 0:
            message = "a reward model scores answers: it writes none and has no likelihoods. Remove this section."
            document.add_error((name,), message)
