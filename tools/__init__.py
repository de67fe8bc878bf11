"""Measurements and plans: python -m tools.bench, python -m tools.scaling."""
