"""What make_corpus.py and train_tiny.py are made of: a small language, documents and questions in it, tiny models."""
