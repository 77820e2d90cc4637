"""ReVersion: see README.md."""
