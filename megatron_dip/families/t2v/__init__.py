"""Text-to-video models: a text encoder before a diffusion transformer over latents."""
