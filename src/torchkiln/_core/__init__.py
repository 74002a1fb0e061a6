"""The mechanism: how a module's tensor becomes a function of other tensors, and stops being one."""
