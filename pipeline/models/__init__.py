"""The networks, their normalisers and checkpoints; one model per file."""
