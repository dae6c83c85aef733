"""Sources of weights: the catalog, `nanokv pull`, GGUF conversion, and the folder of weights. Knows no model code."""
