"""The Zarr store of teacher features: planned once, written by blocks, sealed, read."""
