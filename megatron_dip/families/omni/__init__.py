"""Models of images, sounds and text: two encoders before a language backbone."""
