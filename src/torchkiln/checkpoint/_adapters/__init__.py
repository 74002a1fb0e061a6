"""Adapters of PEFT, merged into a base without the model's code: folders, names, and one rule for each type."""
