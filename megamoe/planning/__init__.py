"""Bytes, traffic and time of a step on any number of ranks, predicted."""
