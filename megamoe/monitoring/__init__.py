"""What a run tells: its log, its events, and what shows them."""
