"""Structures that the teacher labels: made from samples, screened, kept in pieces."""
