"""The mechanism, part by part."""
