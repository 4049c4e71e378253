"""What a person at a terminal sees: progress, and how a command ends."""
