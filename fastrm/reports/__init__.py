"""The report of runs: what their folders say, plots of it, and one page."""
