"""The `nanokv` command, one file per subcommand."""
