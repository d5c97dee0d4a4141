"""How good a model is: the sets that it is evaluated on, and how it is scored."""
