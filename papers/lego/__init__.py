"""Lego: see README.md."""
