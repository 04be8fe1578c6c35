"""The training loop: its plan, one step, the trainer, and what it says."""
