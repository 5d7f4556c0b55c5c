"""Images with the text to read in them: pages, rendered text, scene text."""
