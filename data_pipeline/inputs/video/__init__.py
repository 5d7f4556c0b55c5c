"""Videos with timed captions, and the clips cut out of them."""
