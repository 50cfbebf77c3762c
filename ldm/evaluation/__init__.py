"""Measures: how fast, and how good."""
