"""Trains the demo model: LLaVA-1.5's architecture, our scenes, four hours on a CPU.

It is not part of the wheel, and serving the model does not need it. In a checkout, ``promprune demo-model`` runs
it with ``--train`` and ``--score``.
"""
