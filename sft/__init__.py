"""Supervised fine-tuning: a file of differences over the training loop."""
