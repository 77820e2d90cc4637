"""DreamBooth: see README.md."""
