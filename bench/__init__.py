"""Accuracy, memory and speed: every figure in the documents is printed by a command of this folder."""
