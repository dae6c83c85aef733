"""The `nanokv` command: one file for each of its commands."""
