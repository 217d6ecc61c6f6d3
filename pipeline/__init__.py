"""Stage one: run a teacher once and keep its features in a Zarr store."""
