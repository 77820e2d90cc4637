"""The toy world: a procedural 3D world with ground truth, its benchmark sets, its judge, and tiny-sd's training."""
