"""What can be trained: a module each, with a `Config` and an `Objective` (see ldm/training/run.py)."""
