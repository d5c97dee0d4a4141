"""What a step, a loader and several nodes cost, measured."""
