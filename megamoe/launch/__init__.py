"""Where ranks meet, what is checked before they start, and how a run ends early. Knows no model."""
