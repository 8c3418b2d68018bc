"""The decoder: its parts, loss, generation, parameter names and costs."""
