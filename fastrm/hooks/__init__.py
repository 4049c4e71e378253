"""What listens to a run: metrics, evaluations, verification, profile."""
