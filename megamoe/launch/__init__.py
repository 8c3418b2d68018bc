"""The rendezvous of ranks and hosts, checks before a run, stall and death detection, stop requests. Knows no model."""
