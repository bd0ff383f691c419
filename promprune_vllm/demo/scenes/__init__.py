"""Pictures for a small model: drawn from a seed, with all questions about them and the answers.

Importable without torch. The split determines a scene's handwritten digits, background photographs and random
numbers: a "held-out" scene shares none of the three with a "train" scene.
"""

from promprune_vllm.demo.scenes.record import KINDS, PIXELS, SPLITS, TASKS, Question, Thing
from promprune_vllm.demo.scenes.scene import Scene, make_scene, pair_question

__all__ = ["KINDS", "PIXELS", "SPLITS", "TASKS", "Question", "Scene", "Thing", "make_scene", "pair_question"]
