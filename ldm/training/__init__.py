"""Training: one loop, and the objectives it trains."""
