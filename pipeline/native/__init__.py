"""Parts of a training step in C, compiled on the user's machine."""
