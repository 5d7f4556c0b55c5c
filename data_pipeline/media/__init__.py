"""Images, videos and boxes: sizes from headers, decoding, resizing, patches. Knows no samples, tokens or shards."""
