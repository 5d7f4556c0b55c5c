"""Supervised fine-tuning: the entry and what differs from pretraining."""
