"""Many runs from one file: ``grid`` expands it, ``jobs`` trains, ``table`` reports."""
