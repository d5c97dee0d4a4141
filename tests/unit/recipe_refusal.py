"""What a recipe or an override that can't be used is refused with."""

import pytest
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError


def refusal(*overrides, recipe=SMALL_RECIPE):
    """The one sentence with which the recipe is refused."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message
