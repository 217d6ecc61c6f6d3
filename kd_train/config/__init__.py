"""The configuration of a run, and the recipes of the paper."""
