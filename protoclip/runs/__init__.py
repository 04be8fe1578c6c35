"""What a run keeps on a disk: checkpoints, the run folder, and the way back from both."""
