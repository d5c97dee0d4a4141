"""What other projects call the weights."""
