"""Conformance of ``torchkiln.parametrizations`` with torch."""
