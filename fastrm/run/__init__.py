"""What happens in a run: the loop, the step, checkpoints, the folder."""
