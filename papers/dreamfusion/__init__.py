"""DreamFusion: see README.md."""
