"""Print the JSON Schema of a recipe: python -m train.recipe --schema."""

import argparse
import importlib.metadata
import json
from typing import Any

from train.recipe.schema import Recipe
from train.recipe.sft_config import training_fields, training_model


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe, with the fields of the installed TRL under `training`."""
    schema = Recipe.model_json_schema()
    training = training_model().model_json_schema()
    training["description"] = Recipe.model_fields["training"].description
    training["$comment"] = f"read from trl {importlib.metadata.version('trl')}"
    schema["properties"]["training"] = training
    for name, field in training_fields().items():
        if field.default is None and name in training["properties"]:
            training["properties"][name].pop("default", None)  # None, or computed when TRL is imported
    _drop_titles(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "janus-sft recipe"}


def _drop_titles(schema: Any) -> None:
    """Remove the titles that pydantic derives from names."""
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        if isinstance(value, dict) and isinstance(value.get("title"), str):
            del value["title"]
        _drop_titles(value)


def main() -> None:
    """Print the JSON Schema."""
    parser = argparse.ArgumentParser(prog="python -m train.recipe", description="Print the schema of a recipe.")
    parser.add_argument("--schema", action="store_true", required=True, help="print the JSON Schema for editors")
    parser.parse_args()
    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
