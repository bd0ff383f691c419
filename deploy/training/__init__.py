"""Training the demo model: LLaVA-1.5's architecture, our scenes, a CPU and four hours.

No wheel carries it, and nothing here is needed to serve the model. In a checkout, ``promprune demo-model`` runs it
for ``--train`` and ``--score``.
"""
