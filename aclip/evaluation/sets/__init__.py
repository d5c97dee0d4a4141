"""What is evaluated: sets, their prompts and labels."""
