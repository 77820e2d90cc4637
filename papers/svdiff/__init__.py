"""SVDiff: see README.md."""
