"""Loads and saves published weights. The names that others gave to tensors and settings occur only here."""
