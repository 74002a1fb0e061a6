"""The tests: a folder for each part of the package, and what concerns the repository as a whole."""
