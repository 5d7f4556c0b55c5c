"""Videos with timed captions, and the clips that are cut out of them."""
