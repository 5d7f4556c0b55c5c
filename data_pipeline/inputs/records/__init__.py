"""Records that name or contain their media: JSON lines, Parquet, folders, foreign tars, annotation files, chats."""
