"""Distributed training, on gloo processes of one machine: ``ranks.run(case)`` runs a function on each of them."""
