"""A training run: the loop, the step, checkpoints and the run folder."""
