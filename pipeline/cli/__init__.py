"""The command ``kd-cache``."""
