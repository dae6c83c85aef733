"""The parts of a transformer block: plain classes that hold tensors and are called. They know no family and no file."""
