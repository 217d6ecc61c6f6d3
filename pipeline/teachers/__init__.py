"""Potentials as teachers: the interface, its contract, our own models and plug-ins."""
