"""Data sets: one file a family, one registry of downstream tasks."""
