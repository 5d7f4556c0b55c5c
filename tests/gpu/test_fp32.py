"""The torch backend in float32 on a GPU: what CPUs are held to, with the same tolerances."""

from __future__ import annotations

from tests.model.test_parity import (  # noqa: F401
    test_a_broken_pack_is_far_off,
    test_a_mask_that_is_not_causal_is_far_off,
    test_a_model_without_images_has_zero_gradients_in_the_tower,
    test_every_gradient_equals_transformers,
    test_logits_equal_transformers,
    test_packed_samples_equal_each_run_alone,
)
