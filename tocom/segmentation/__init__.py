"""The segmentation study: tokens merge before each MLP and come back after it, so that a dense head sees them all."""
