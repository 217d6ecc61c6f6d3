"""Work in several threads, processes and machines."""
