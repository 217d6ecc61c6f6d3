"""Specs: YAML files that state what a store is made of."""
