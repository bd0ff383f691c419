"""Training the demo model: LLaVA-1.5's architecture, our scenes, a CPU and four hours.

Nothing here is needed to serve the model. torch and transformers are imported by the modules, so import them late.
"""
