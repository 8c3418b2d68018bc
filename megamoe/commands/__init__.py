"""What `megamoe VERB` does: the module of a verb's name has the function of that name."""
