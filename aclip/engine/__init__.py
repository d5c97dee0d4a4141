"""DeepSpeed: process group, optimizer, engine and the state that it shards."""
