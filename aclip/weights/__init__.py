"""Weights by name: out of a checkpoint, into a new run, to other projects."""
