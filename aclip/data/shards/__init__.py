"""The bytes of shards: listed, counted, fetched, read."""
