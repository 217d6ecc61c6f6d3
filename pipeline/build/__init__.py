"""From a spec to a sealed store: scan, plan, fill, seal."""
