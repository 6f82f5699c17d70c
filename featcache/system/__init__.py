"""The process and the disk: where to compute, how to survive, how to write."""
