"""Supervised fine-tuning: the entry and its differences from pretraining."""
