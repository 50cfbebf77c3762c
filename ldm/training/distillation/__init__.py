"""Distillation into few steps: what is taught (kinds of `model`), and how (kinds of `method`)."""
