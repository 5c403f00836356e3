"""Recipe: the YAML file that describes a training run, its schema and its validation."""

from train.recipe.preference import PreferenceSection
from train.recipe.schema import (
    TIME,
    AdapterSection,
    AttentionName,
    ChatSection,
    DataSection,
    EvaluationSection,
    GuardsSection,
    ModelSection,
    PathText,
    QuantizationSection,
    Recipe,
    SaveSection,
    Section,
    SystemGainSection,
    Text,
    TrackingSection,
    WandbSection,
    load_recipe,
)
from train.recipe.sources import Source, Sources, TrainingSource

__all__ = [
    "TIME",
    "AdapterSection",
    "AttentionName",
    "ChatSection",
    "DataSection",
    "EvaluationSection",
    "GuardsSection",
    "ModelSection",
    "PathText",
    "PreferenceSection",
    "QuantizationSection",
    "Recipe",
    "SaveSection",
    "Section",
    "Source",
    "Sources",
    "SystemGainSection",
    "Text",
    "TrackingSection",
    "TrainingSource",
    "WandbSection",
    "load_recipe",
]
