"""Readers of images with the text in them (OCR): pages, rendered text and scene text."""
