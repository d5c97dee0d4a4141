"""Shards on disk -> the same stream of uint8 batches for any number of ranks and workers."""
