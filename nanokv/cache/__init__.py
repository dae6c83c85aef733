"""The cache: page ids (pool), their bytes (store), the prefix tree (radix), and one interface to them (manager)."""
