"""One module a data set; each yields entries or what it rejects."""
