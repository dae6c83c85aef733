"""The parts of `nanokv chat` (cli/chat.py): reading lines, answering, slash commands, drawing the cache."""
