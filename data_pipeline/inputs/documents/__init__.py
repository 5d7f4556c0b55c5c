"""Documents with their figures: PDF, PPTX, web pages, Markdown, plain text."""
