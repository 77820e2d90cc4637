"""NeTI: see README.md."""
