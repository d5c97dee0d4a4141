"""A section of a recipe: the base of the keys that config/ and the parts of a method declare."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Width = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A frozen section of the recipe that refuses unknown keys. A key's docstring is its manual."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
