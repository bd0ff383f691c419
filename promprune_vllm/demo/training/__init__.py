"""Training the demo model: LLaVA-1.5's architecture, our scenes, a CPU and an hour and a half.

Nothing here is needed to serve the model. torch and transformers are imported by the modules, so import them late.
"""
