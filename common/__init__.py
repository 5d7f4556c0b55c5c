"""What both model/ and data_pipeline/ need: files written completely, disk space, sizes, nearest names."""
