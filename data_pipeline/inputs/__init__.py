"""Readers of user data: one class per input kind. It lists units that are read alone, and yields drafts of samples."""
