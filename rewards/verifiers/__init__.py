"""The verifiers, one subject per module. `rewards.table` has all of them by name."""
