"""Stage two: train students against a store of teacher features."""
