"""How it is scored."""
