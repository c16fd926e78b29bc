"""Vision-language models: an image tower and a language backbone over packed sequences."""
