"""Where weights come from: the catalog, the pull, GGUF conversion, and the folder they live in. Knows no model code."""
