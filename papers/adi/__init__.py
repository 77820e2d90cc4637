"""ADI: see README.md."""
