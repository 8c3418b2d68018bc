"""megamoe: pretraining of Mixture-of-Experts decoders on DeepSpeed."""

__version__ = "0.1.0"
