"""How a model is scored, from embeddings alone."""
