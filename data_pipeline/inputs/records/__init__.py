"""Records that name or hold their media: JSON lines, Parquet, folders, foreign tars, annotation files, chats."""
