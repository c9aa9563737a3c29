"""Cells to statistics to tables and figures; nothing here imports torch."""
