"""What a recipe or an override that can't be used is refused with."""

import pytest

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError


def refusal(*overrides, recipe="demo"):
    """The one sentence with which the recipe is refused."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message
