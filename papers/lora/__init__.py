"""LoRA: see README.md."""
