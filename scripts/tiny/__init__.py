"""Parts of make_corpus.py and train_tiny.py: a small language, documents and questions in it, tiny models."""
