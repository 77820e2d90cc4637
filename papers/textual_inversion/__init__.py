"""Textual Inversion: see README.md."""
