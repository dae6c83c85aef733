"""The engine: plans, runs and resolves steps, and drives them for any number of callers."""
