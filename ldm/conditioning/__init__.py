"""Conditioning: prompts to the hidden states (and pooled vectors) that a denoiser attends to."""
