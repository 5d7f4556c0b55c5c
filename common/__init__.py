"""What both model/ and data_pipeline/ need and neither owns: files written whole, sizes in bytes, nearest names."""
