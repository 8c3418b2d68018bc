"""Scoring, held-out sets, tasks."""
