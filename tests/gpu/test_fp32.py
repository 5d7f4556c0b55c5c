"""The torch backend in float32 on a GPU, with the tests and tolerances of the CPU."""

from __future__ import annotations

from tests.model.test_linear import (  # noqa: F401
    test_gradients_are_added_to_a_buffer_of_their_dtype,
    test_product_and_gradients_equal_torch,
)
from tests.model.test_parity import (  # noqa: F401
    test_broken_pack_misses_the_tolerance_a_hundredfold,
    test_every_gradient_equals_transformers,
    test_logits_equal_transformers,
    test_mask_that_is_not_causal_misses_the_tolerance_a_hundredfold,
    test_packed_samples_equal_each_run_alone,
    test_tower_gradients_are_zero_without_images,
)
