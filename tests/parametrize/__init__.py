"""Conformance of ``torchkiln.parametrize`` with torch."""
