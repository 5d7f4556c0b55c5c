"""From inputs to shards: tasks that any number of processes share, that resume after any stop and give the same bytes."""
