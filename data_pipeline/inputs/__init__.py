"""What users have, as drafts of samples: one class per input kind, which cuts its files into units read alone."""
