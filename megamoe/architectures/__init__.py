"""The decoders of transformers that megamoe reads and writes: what their config.json and their tensors are here."""
