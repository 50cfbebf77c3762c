"""What objectives learn from: latents, conditions, squares for a first stage; from disk, or of a kind of one's own."""
