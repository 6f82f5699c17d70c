"""The HDF5 file of format version 1: write, read, verify. No torch, no image."""
