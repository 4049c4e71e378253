"""The terminal: progress display, and the end of a command."""
