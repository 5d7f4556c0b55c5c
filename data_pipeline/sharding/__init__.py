"""From inputs to shards: tasks that many processes share, that resume after any stop and give the same bytes."""
