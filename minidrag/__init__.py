"""DragDiffusion on Stable Diffusion 1.5, written from scratch to be read."""
