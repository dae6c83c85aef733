"""Text to token ids and back: tokenizer, chat template, conversation, incremental detokenizer. Knows no tensors."""
