"""The loss: one file a term (term.py says what a term is, terms.py lists them)."""
