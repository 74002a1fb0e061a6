"""The spellings of parametrized tensors: what keys mean, which values they stand for, and rewriting them."""
