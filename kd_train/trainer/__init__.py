"""One training run: its loop, its losses added up, its processes, its files."""
