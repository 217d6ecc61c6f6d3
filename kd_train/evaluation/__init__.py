"""Metrics, throughput and similarity of models; finished students as files."""
