"""Readers of documents with their figures: PDF, PPTX, HTML, Markdown and plain text."""
