"""3D: cameras, fields, rendering with gradients, meshes and views, on nerfstudio's classes."""
