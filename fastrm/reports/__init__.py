"""The report of runs: reads their folders, plots them, and writes one page."""
