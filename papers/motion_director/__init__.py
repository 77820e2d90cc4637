"""MotionDirector: see README.md."""
