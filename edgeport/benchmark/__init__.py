"""Accuracy against memory: one patch, several bases and precisions, the same questions put to each."""
