"""P+: see README.md."""
