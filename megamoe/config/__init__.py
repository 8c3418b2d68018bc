"""Configuration: presets, the DeepSpeed JSON and the command line, parsed and checked."""
