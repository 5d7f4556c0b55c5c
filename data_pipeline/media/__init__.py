"""Images and videos: sizes and pixel budgets from headers, decoding, resizing, patches; boxes."""
