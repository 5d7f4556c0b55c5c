"""From a Sample and its bytes to an EncodedSample, and from several of these to a Batch: tokens, rope positions, collation."""
