"""ProSpect: see README.md."""
