"""What a run leaves on disk, by name."""
