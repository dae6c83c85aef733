"""The parts of a transformer block: plain callable classes that hold tensors. They know neither families nor files."""
