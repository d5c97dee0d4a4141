"""How good a model is: on which sets, scored how."""
