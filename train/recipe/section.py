"""Base class of the sections of a recipe, and types of their keys."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from train.storage.local_paths import LocalPath

Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, LocalPath()]


class Section(BaseModel):
    """Base of all sections: strict and frozen; the docstring of each attribute becomes its description."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
