"""The settings of a run and of each command: what they are, their defaults, and how the command line gives them."""
