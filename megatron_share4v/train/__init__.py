"""Training: build everything, then step until done."""
