"""Metrics, throughput and similarity of models, and finished students as files."""
