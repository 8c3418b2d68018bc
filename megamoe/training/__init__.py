"""Engine, step, loop, balancing, guard and metrics."""
