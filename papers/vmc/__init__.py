"""VMC: see README.md."""
