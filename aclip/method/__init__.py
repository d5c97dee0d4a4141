"""What a paper changes: losses, masks, schedules. Functions of tensors."""
