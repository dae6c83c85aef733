"""What scripts/lessons.py does, one file a verb."""
