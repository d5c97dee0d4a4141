"""The training loop; README.md says in which order to read it."""
