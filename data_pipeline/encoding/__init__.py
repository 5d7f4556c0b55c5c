"""From a Sample and its bytes to EncodedSample and Batch: tokens, rope positions, collation."""
