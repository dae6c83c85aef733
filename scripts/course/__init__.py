"""The verbs of scripts/lessons.py, one file each."""
