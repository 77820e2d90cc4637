"""DreamBooth3D: see README.md."""
