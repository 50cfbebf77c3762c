"""Training pictures composed from openly licensed sprites: sources, sprites, captions, the recipe."""
