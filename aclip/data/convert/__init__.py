"""Data sets as they are downloaded -> WebDataset shards; one source a file, one common writer."""
