"""Stores that the benchmark compares: one class each, on the same ragged samples."""
