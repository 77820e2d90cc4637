"""Custom Diffusion: see README.md."""
