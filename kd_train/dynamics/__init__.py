"""Molecular dynamics that shows whether a potential can be run, for ``kd-eval``."""
