"""Long runs with faults. Each compares every answer with that of the same request alone; see scripts/soak.py."""
