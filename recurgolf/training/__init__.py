"""The process of a run: ranks, steps, clocks, checkpoints, and the end with a file that counts."""
