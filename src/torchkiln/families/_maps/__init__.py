"""The mathematics of the families: pure functions of tensors, grouped as the families are."""
