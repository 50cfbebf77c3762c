"""Prompts in which words have weights, and which may change between steps."""
