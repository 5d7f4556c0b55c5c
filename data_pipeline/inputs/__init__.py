"""What people have, as drafts of samples: files and folders of many kinds, each cut into units that are read alone."""
