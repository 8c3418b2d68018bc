"""Engine, step, loop, balancing, metrics and sinks."""
